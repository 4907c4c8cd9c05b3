"""Midtraining and SFT on a tiny model: really trained, exactly resumed, and refused where they would build on sand."""

import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed import run_distributed
from nanochat.checkpoint.store import load_checkpoint
from nanochat.config import MachineConfig, TrainBaseConfig, TrainMidConfig, TrainSFTConfig
from nanochat.corpus.conversation import assistant, user
from nanochat.data_stages import conversations_stage
from nanochat.errors import DataError, StoppedForRequeueError, UsageError
from nanochat.model.gpt import GPT
from nanochat.runtime import Runtime
from nanochat.tokenizer.conversation import render_message
from nanochat.tokenizer.tokenizer import Tokenizer
from nanochat.tracking.console import Console
from nanochat.tracking.keys import CLOCKED
from nanochat.tracking.metrics import read
from nanochat.training.base import train_base
from nanochat.training.chat import ChatStage, train_chat
from nanochat.training.session import metrics_path
from nanochat.workspace import Workspace

RUN, TAG = "test-run", "tiny"
CPU = Runtime(torch.device("cpu"), torch.float32)
MACHINE = MachineConfig(wandb="disabled")
SEQUENCE_LEN = 96
BASE = TrainBaseConfig(
    depth=2,
    aspect_ratio=16,
    head_dim=16,
    sequence_len=SEQUENCE_LEN,
    model_tag=TAG,
    num_steps=4,
    total_batch_size=8 * SEQUENCE_LEN,
    device_batch_size=8,
    lanes=4,
    pool_size=8,
    scale_hyperparameters=False,
    weight_decay=0.0,
    eval_tokens=1024,
    save_every=0,
    wandb="disabled",
)
MID = TrainMidConfig(
    tasks=("arithmetic:300", "identity"),
    num_steps=8,
    device_batch_size=8,
    lanes=4,
    pool_size=8,
    eval_every=4,
    eval_tokens=2048,
    save_every=3,
    log_every=1,
)
SFT = TrainSFTConfig(
    tasks=("arithmetic:100",),
    num_steps=4,
    batch_fraction=0.5,
    device_batch_size=8,
    lanes=4,
    pool_size=8,
    eval_tokens=2048,
    save_every=0,
    log_every=1,
)
# Another order of summation changes the last bits of a gradient, and a few steps at a high rate carry that on.
ROUNDING = 1e-2


def prepare(workspace: Workspace, stage: ChatStage, tasks: tuple[str, ...]) -> None:
    conversations_stage(stage, tasks, SEQUENCE_LEN, workspace, Console(enabled=False))


def train(workspace: Workspace, stage: ChatStage, runtime: Runtime = CPU, **changes: Any) -> dict[str, Any]:
    config = replace(MID if stage == "mid" else SFT, **changes)
    return train_chat(stage, config, MACHINE, RUN, TAG, workspace, runtime)


def weights(workspace: Workspace, stage: ChatStage | str, step: int) -> dict[str, torch.Tensor]:
    return load_checkpoint(workspace.checkpoints(stage, TAG), step, "").model  # type: ignore[arg-type]


def results(workspace: Workspace, stage: ChatStage) -> list[dict[str, Any]]:
    """The metrics without what a clock decides."""
    return [
        {key: value for key, value in row.items() if key not in CLOCKED}
        for row in read(metrics_path(workspace, RUN, stage, TAG))
    ]


def losses(workspace: Workspace, stage: ChatStage) -> list[float]:
    return [row["batch/loss"] for row in results(workspace, stage) if "batch/loss" in row]


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def _with_base(tmp_path_factory: pytest.TempPathFactory, _prepared_workspace: Path) -> Path:
    root = tmp_path_factory.mktemp("with-base") / "workspace"
    workspace = Workspace(Path(shutil.copytree(_prepared_workspace, root)))
    train_base(BASE, RUN, workspace, CPU)
    prepare(workspace, "mid", MID.tasks)
    prepare(workspace, "sft", SFT.tasks)
    return root


@pytest.fixture
def with_base(_with_base: Path, tmp_path: Path) -> Workspace:
    """A workspace of one's own with a finished base model and conversations."""
    return Workspace(Path(shutil.copytree(_with_base, tmp_path / "with-base")))


@pytest.fixture(scope="module")
def undisturbed(_with_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Midtrained and finetuned, and nothing happened on the way."""
    workspace = Workspace(Path(shutil.copytree(_with_base, tmp_path_factory.mktemp("undisturbed") / "workspace")))
    train(workspace, "mid")
    train(workspace, "sft")
    return workspace


def test_every_stage_takes_its_steps_and_changes_every_matrix(undisturbed: Workspace) -> None:
    base, mid, sft = (weights(undisturbed, stage, step) for stage, step in (("base", 4), ("mid", 8), ("sft", 4)))
    for before, after in ((base, mid), (mid, sft)):
        unchanged = [name for name in before if before[name].ndim == 2 and torch.equal(before[name], after[name])]
        assert not unchanged


def test_the_model_learns_to_answer(undisturbed: Workspace) -> None:
    bits = [row["epoch/bpb"] for row in results(undisturbed, "mid") if "epoch/bpb" in row]
    assert bits[0] > bits[1] > bits[2]
    assert bits[2] < 0.7 * bits[0]


def test_a_stage_begins_where_the_one_before_ended(with_base: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, torch.Tensor]] = []
    forward = GPT.forward

    def watching(self: GPT, tokens: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        if not seen:
            seen.append({name: value.clone() for name, value in self.state_dict().items()})
        return forward(self, tokens, targets)

    monkeypatch.setattr(GPT, "forward", watching)
    train(with_base, "mid")
    assert same(seen[0], weights(with_base, "base", 4))


def test_the_optimizer_is_warm_unless_told_otherwise(with_base: Workspace, undisturbed: Workspace) -> None:
    train(with_base, "mid", warm_start=False)
    assert losses(with_base, "mid")[0] == losses(undisturbed, "mid")[0]
    assert losses(with_base, "mid")[1] != losses(undisturbed, "mid")[1]


def test_the_loss_is_the_mean_over_all_trained_tokens_of_the_global_batch(
    with_base: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    sums: list[tuple[float, int]] = []
    forward = GPT.forward

    def watching(self: GPT, tokens: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        loss = forward(self, tokens, targets)
        if targets is not None:
            # From the model's plain logits, so that the fused loss is not checked against itself.
            logits = forward(self, tokens).detach()
            nats = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum"
            )
            sums.append((nats.item(), int((targets >= 0).sum())))
        return loss

    monkeypatch.setattr(GPT, "forward", watching)
    train(with_base, "mid", num_steps=2, device_batch_size=1)
    assert len(sums) == 2 * 8
    assert len({count for _, count in sums[:8]}) > 1, "rows with equal counts would not tell the two means apart"
    for step, loss in enumerate(losses(with_base, "mid")):
        rows = sums[8 * step : 8 * step + 8]
        assert loss == pytest.approx(sum(nats for nats, _ in rows) / sum(count for _, count in rows), rel=1e-5)


def train_until_stopped(workspace: Workspace, stage: ChatStage, step: int) -> None:
    """Train and send this process a stop signal in the middle of the given step."""
    calls = 0
    forward = GPT.forward

    def counting(self: GPT, tokens: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        nonlocal calls
        if targets is not None:
            calls += 1
            if calls == step:
                os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, tokens, targets)

    GPT.forward = counting  # type: ignore[method-assign]
    try:
        with pytest.raises(StoppedForRequeueError, match=f"{stage} stopped at step {step}"):
            train(workspace, stage)
    finally:
        GPT.forward = forward  # type: ignore[method-assign]


@pytest.mark.parametrize("step", [1, 4, 7])
def test_a_stopped_stage_carries_on_as_if_nothing_had_happened(
    step: int, with_base: Workspace, undisturbed: Workspace
) -> None:
    train_until_stopped(with_base, "mid", step)
    train(with_base, "mid")
    train_until_stopped(with_base, "sft", 2)
    train(with_base, "sft")
    for stage, last in (("mid", 8), ("sft", 4)):
        first, second = (
            load_checkpoint(workspace.checkpoints(stage, TAG), last, "")  # type: ignore[arg-type]
            for workspace in (with_base, undisturbed)
        )
        assert same(first.model, second.model)
        assert same(first.optimizer, second.optimizer)
    assert results(with_base, "mid") == results(undisturbed, "mid")
    assert results(with_base, "sft") == results(undisturbed, "sft")


def train_on_ranks(root: str) -> list[float]:
    """One rank's part of midtraining; returns the losses that rank 0 logged."""
    runtime = Runtime(CPU.device, CPU.compute_dtype, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    train(Workspace(Path(root)), "mid", runtime)
    return losses(Workspace(Path(root)), "mid")


def test_several_ranks_train_as_one(with_base: Workspace, undisturbed: Workspace) -> None:
    found = run_distributed(train_on_ranks, 2, str(with_base.root), timeout_s=200)[0]
    assert found == pytest.approx(losses(undisturbed, "mid"), rel=ROUNDING)
    # The first step has seen no optimizer yet, so the batch and its weighting alone decide its loss.
    assert found[0] == pytest.approx(losses(undisturbed, "mid")[0], rel=1e-6)


def test_accumulation_gives_the_same_run(with_base: Workspace, undisturbed: Workspace) -> None:
    train(with_base, "mid", device_batch_size=2)
    assert losses(with_base, "mid") == pytest.approx(losses(undisturbed, "mid"), rel=ROUNDING)


def test_sft_may_continue_the_base_model_directly(with_base: Workspace) -> None:
    assert train(with_base, "sft", source="base")["steps"] == 4


def test_a_smaller_batch_takes_smaller_steps(undisturbed: Workspace) -> None:
    mid, sft = (
        load_checkpoint(undisturbed.checkpoints(stage, TAG), step, "").config["recipe"]  # type: ignore[arg-type]
        for stage, step in (("mid", 8), ("sft", 4))
    )
    assert mid["total_batch_size"] == 8 * SEQUENCE_LEN
    assert sft["total_batch_size"] == 4 * SEQUENCE_LEN
    assert sft["lr_scale"] == pytest.approx(mid["lr_scale"] * SFT.lr_fraction * 0.5**0.5)


def refuse_without_mid(workspace: Workspace) -> None:
    train(workspace, "sft")


def refuse_half_a_base(workspace: Workspace) -> None:
    folder = workspace.checkpoints("base", TAG)
    shutil.rmtree(folder)
    train_base(replace(BASE, num_steps=4, save_every=1, keep_checkpoints=4), RUN, workspace, CPU)
    shutil.rmtree(folder / "step_000004")
    train(workspace, "mid")


def refuse_missing_conversations(workspace: Workspace) -> None:
    shutil.rmtree(workspace.conversation_tokens("mid"))
    train(workspace, "mid")


def refuse_other_tasks(workspace: Workspace) -> None:
    train(workspace, "mid", tasks=("identity",))


def refuse_other_settings(workspace: Workspace) -> None:
    train(workspace, "mid")
    train(workspace, "mid", lr_fraction=0.5)


def refuse_a_crooked_batch(workspace: Workspace) -> None:
    train(workspace, "mid", total_batch_size=100)


@pytest.mark.parametrize(
    ("attempt", "error", "message"),
    [
        (refuse_without_mid, UsageError, r"mid_checkpoints.* holds no mid checkpoint.*nanochat train mid"),
        (refuse_half_a_base, UsageError, r"step 3 of 4.*finish it: nanochat train base --run test-run"),
        (
            refuse_missing_conversations,
            DataError,
            r"missing.*nanochat data conversations mid --sequence-len 96 --tasks a",
        ),
        (refuse_other_tasks, DataError, r"made with tasks .*nanochat data conversations mid .*--tasks identity"),
        (refuse_other_settings, UsageError, r"lr_fraction 1.0 → 0.5"),
        (refuse_a_crooked_batch, UsageError, r"--total-batch-size 100 is not a whole number.*--total-batch-size 96"),
    ],
)
def test_what_would_build_on_sand_is_refused_with_the_way_out(
    attempt: Callable[[Workspace], None], error: type[Exception], message: str, with_base: Workspace
) -> None:
    with pytest.raises(error, match=message):
        attempt(with_base)


def test_a_stage_without_tasks_is_refused() -> None:
    with pytest.raises(UsageError, match="nothing would be trained"):
        replace(MID, tasks=())


def test_conversations_are_tokenised_once(with_base: Workspace) -> None:
    manifest = with_base.conversation_tokens("mid") / "manifest.json"
    before = manifest.stat().st_mtime_ns
    prepare(with_base, "mid", MID.tasks)
    assert manifest.stat().st_mtime_ns == before
    prepare(with_base, "mid", ("identity",))
    assert manifest.stat().st_mtime_ns != before


def test_only_the_answers_are_trained_on(with_base: Workspace) -> None:
    tokenizer = Tokenizer.load(with_base.tokenizer)
    _, asked = render_message(tokenizer, user("What is 2 + 2?"))
    _, answered = render_message(tokenizer, assistant("4"))
    assert not any(asked)
    assert answered == [False, True, True]

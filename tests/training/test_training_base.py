"""Pretraining end to end on a tiny model: it learns, resumes exactly, and agrees between one rank and several."""

import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from distributed import run_distributed
from nanochat.checkpoint.folders import list_steps
from nanochat.checkpoint.store import CheckpointNotSavedError, load_checkpoint
from nanochat.config import TrainBaseConfig
from nanochat.errors import DataError, NanochatError, StoppedForRequeueError, UsageError
from nanochat.files import lock_folder
from nanochat.loader.batches import BatchLoader
from nanochat.model.gpt import GPT
from nanochat.runtime import Runtime, on_progress
from nanochat.tokenizer.train import train_tokenizer
from nanochat.tracking.keys import CLOCKED
from nanochat.tracking.metrics import MetricsLog, read
from nanochat.training import base as base_module
from nanochat.training import loop
from nanochat.training.base import train_base
from nanochat.training.session import metrics_path
from nanochat.workspace import Workspace
from toolchain import needs_compiler

RUN = "test-run"
CONFIG = TrainBaseConfig(
    depth=2,
    aspect_ratio=16,
    head_dim=16,
    sequence_len=32,
    model_tag="tiny",
    num_steps=12,
    total_batch_size=16 * 32,
    device_batch_size=16,
    lanes=12,
    pool_size=8,
    scale_hyperparameters=False,
    weight_decay=0.0,
    eval_every=6,
    eval_tokens=1024,
    save_every=4,
    log_every=1,
    dtype="float32",
    wandb="disabled",
)
CPU = Runtime(torch.device("cpu"), torch.float32)
# What a clock decides; everything else in a metrics file is a result.
# Another order of summation changes the last bits of a gradient, and a dozen steps at a high rate carry that on.
ROUNDING = 1e-2


def results(workspace: Workspace) -> list[dict[str, Any]]:
    """The metrics without what a clock decides."""
    return [
        {key: value for key, value in row.items() if key not in CLOCKED}
        for row in read(metrics_path(workspace, RUN, "base", "tiny"))
    ]


def weights_digest(workspace: Workspace, step: int = 12) -> dict[str, str]:
    """Digests of the weights and the optimizer state of a step."""
    folder = workspace.checkpoints("base", "tiny") / f"step_{step:06d}"
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.safetensors"))}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, _prepared_workspace: Path) -> Workspace:
    """A run from start to end that nothing happened to."""
    root = tmp_path_factory.mktemp("undisturbed") / "workspace"
    workspace = Workspace(Path(shutil.copytree(_prepared_workspace, root)))
    train_base(CONFIG, RUN, workspace, CPU)
    return workspace


def test_the_model_learns(undisturbed: Workspace) -> None:
    rows = results(undisturbed)
    bpb = [row["epoch/bpb"] for row in rows if "epoch/bpb" in row]
    assert [row["step"] for row in rows if "epoch/bpb" in row] == [0, 6, 12]
    assert bpb[0] > bpb[1] > bpb[2]
    assert bpb[2] < 0.8 * bpb[0]


def test_every_step_is_logged_once_with_its_schedule(undisturbed: Workspace) -> None:
    rows = [row for row in results(undisturbed) if "batch/loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["batch/tokens"] for row in rows] == [16 * 32 * step for step in range(1, 13)]


def test_the_report_section_tells_what_was_trained(undisturbed: Workspace) -> None:
    section = json.loads((undisturbed.report / "sections" / "base.json").read_text())
    assert section["figures"]["Steps"] == 12
    assert section["summary"]["Bits per byte"] < section["figures"]["Bits per byte of a byte-unigram model"]
    assert all((undisturbed.report / plot["file"]).stat().st_size > 1000 for plot in section["plots"])
    assert len(section["samples"]) >= 3


def test_a_checkpoint_says_what_made_it(undisturbed: Workspace) -> None:
    checkpoint = load_checkpoint(undisturbed.checkpoints("base", "tiny"), 12, "")
    assert checkpoint.config["identity"]["model"]["n_layer"] == 2
    assert checkpoint.config["environment"]["packages"]["torch"] == version("torch")
    assert checkpoint.config["identity"]["tokenizer"]
    assert checkpoint.config["identity"]["data"]
    assert len(checkpoint.state["loader"]["lanes"]) == 12


def train_until_stopped(
    workspace: Workspace, step: int, config: TrainBaseConfig = CONFIG, stops_at: int | None = None
) -> None:
    """Train in this process and send it a stop signal in the middle of the given step, to stop there or later."""
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
        with pytest.raises(StoppedForRequeueError, match=f"step {stops_at or step} of 12 on SIGTERM"):
            train_base(config, RUN, workspace, CPU)
    finally:
        GPT.forward = forward  # type: ignore[method-assign]


# Where results are read one step late, as on a GPU, a stop is too, unless a save or an evaluation waits for them.
@pytest.mark.parametrize(
    ("step", "steps_ahead", "stops_at"),
    [(1, 0, 1), (5, 0, 5), (6, 0, 6), (8, 0, 8), (1, 1, 1), (2, 1, 3), (8, 1, 8), (9, 1, 10)],
)
def test_a_stopped_run_carries_on_as_if_nothing_had_happened(
    step: int,
    steps_ahead: int,
    stops_at: int,
    prepared_workspace: Workspace,
    undisturbed: Workspace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(loop.STEPS_AHEAD, "cpu", steps_ahead)
    train_until_stopped(prepared_workspace, step, stops_at=stops_at)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    train_base(CONFIG, RUN, prepared_workspace, CPU)
    assert weights_digest(prepared_workspace) == weights_digest(undisturbed)
    assert results(prepared_workspace) == results(undisturbed)


TRAINER = """
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[2]]
import torch
from test_training_base import CONFIG, CPU, RUN
from nanochat.training.base import train_base
from nanochat.workspace import Workspace
torch.set_num_threads(1)
train_base(CONFIG, RUN, Workspace(Path(sys.argv[1])), CPU)
"""


def test_a_run_killed_at_random_moments_ends_with_the_same_weights_and_metrics(
    prepared_workspace: Workspace, undisturbed: Workspace
) -> None:
    chance = random.Random(0)
    metrics = metrics_path(prepared_workspace, RUN, "base", "tiny")
    here = str(Path(__file__).parent)
    paths = os.pathsep.join([here, str(Path(here).parent)])
    command = [sys.executable, "-c", TRAINER, str(prepared_workspace.root), here]
    environment = {**os.environ, "PYTHONPATH": paths}
    for _ in range(4):
        seen = metrics.stat().st_size if metrics.exists() else 0
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        # Wait until it is under way, so that the kill lands among steps, saves and evaluations.
        while process.poll() is None and (metrics.stat().st_size if metrics.exists() else 0) <= seen:
            time.sleep(0.002)
        time.sleep(chance.random() * 0.15)
        process.kill()
        process.wait()
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    assert weights_digest(prepared_workspace) == weights_digest(undisturbed)
    assert results(prepared_workspace) == results(undisturbed)


def train_on_ranks(root: str, config: TrainBaseConfig) -> list[float]:
    """One rank's part of a run; returns the losses that rank 0 logged."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    workspace = Workspace(Path(root))
    train_base(config, RUN, workspace, Runtime(torch.device("cpu"), torch.float32, rank, world_size))
    return [row["batch/loss"] for row in results(workspace) if "batch/loss" in row]


@pytest.mark.parametrize("world_size", [2, 4])
def test_several_ranks_train_as_one(world_size: int, prepared_workspace: Workspace, undisturbed: Workspace) -> None:
    losses = run_distributed(train_on_ranks, world_size, str(prepared_workspace.root), CONFIG, timeout_s=200)[0]
    expected = [row["batch/loss"] for row in results(undisturbed) if "batch/loss" in row]
    assert losses == pytest.approx(expected, rel=ROUNDING)
    # The first step has seen no optimizer yet, so the batch alone decides its loss.
    assert losses[0] == pytest.approx(expected[0], rel=1e-6)
    ours, theirs = (results(workspace)[-1]["epoch/bpb"] for workspace in (prepared_workspace, undisturbed))
    assert ours == pytest.approx(theirs, rel=ROUNDING)


def test_a_run_stopped_on_one_rank_is_finished_on_two(prepared_workspace: Workspace, undisturbed: Workspace) -> None:
    train_until_stopped(prepared_workspace, 5)
    losses = run_distributed(train_on_ranks, 2, str(prepared_workspace.root), CONFIG, timeout_s=200)[0]
    expected = [row["batch/loss"] for row in results(undisturbed) if "batch/loss" in row]
    assert losses == pytest.approx(expected, rel=ROUNDING)


def test_accumulation_gives_the_same_run(prepared_workspace: Workspace, undisturbed: Workspace) -> None:
    train_base(replace(CONFIG, device_batch_size=4), RUN, prepared_workspace, CPU)
    losses, expected = (
        [row["batch/loss"] for row in results(workspace) if "batch/loss" in row]
        for workspace in (prepared_workspace, undisturbed)
    )
    assert losses == pytest.approx(expected, rel=ROUNDING)


def test_a_step_of_many_passes_shows_that_it_moves(prepared_workspace: Workspace) -> None:
    signs: list[int] = []
    on_progress.append(lambda: signs.append(1))
    try:
        train_base(replace(CONFIG, num_steps=1, device_batch_size=2), RUN, prepared_workspace, CPU)
    finally:
        on_progress.pop()
    evaluated = CONFIG.eval_tokens // CONFIG.sequence_len // 2
    assert len(signs) == 16 // 2 + evaluated * 2


def train_until_another_rank_stops(root: str) -> str:
    """One rank's part of a run whose results are read one step late, and whose last rank is told to stop in step 2."""
    loop.STEPS_AHEAD["cpu"] = 1
    workspace, rank, world_size = Workspace(Path(root)), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    calls, next_step = iter(range(1, 100)), BatchLoader.next_step

    def load(loader: BatchLoader) -> list[tuple[torch.Tensor, torch.Tensor]]:
        if next(calls) == 2 and rank == world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return next_step(loader)

    BatchLoader.next_step = load  # type: ignore[method-assign]
    with pytest.raises(StoppedForRequeueError) as stopped:
        train_base(CONFIG, RUN, workspace, Runtime(torch.device("cpu"), torch.float32, rank, world_size))
    return str(stopped.value)


def test_ranks_that_read_results_late_stop_at_the_same_step(prepared_workspace: Workspace) -> None:
    messages = run_distributed(train_until_another_rank_stops, 2, str(prepared_workspace.root))
    assert all("stopped at step 3 of 12" in message for message in messages)
    assert list_steps(prepared_workspace.checkpoints("base", "tiny")) == [3]


def train_with_slow_samples(root: str, config: TrainBaseConfig) -> tuple[list[float], list[float]]:
    """One rank's part of a run; returns when rank 0 had its samples, and when this rank began its steps."""
    sampled, begun = [], []
    draw, next_step = base_module.draw_samples, BatchLoader.next_step

    def draw_slowly(*arguments: Any) -> list[dict[str, str]]:
        time.sleep(0.5)
        texts = draw(*arguments)
        sampled.append(time.monotonic())
        return texts

    def tell_and_load(loader: BatchLoader) -> list[tuple[torch.Tensor, torch.Tensor]]:
        begun.append(time.monotonic())
        return next_step(loader)

    base_module.draw_samples, BatchLoader.next_step = draw_slowly, tell_and_load  # type: ignore[method-assign]
    train_on_ranks(root, config)
    return sampled, begun


def test_no_rank_begins_a_step_while_rank_0_draws_samples_and_may_be_ended_by_a_stop(
    prepared_workspace: Workspace,
) -> None:
    config = replace(CONFIG, num_steps=2, sample_every=1)
    (sampled, _), (none, begun) = run_distributed(train_with_slow_samples, 2, str(prepared_workspace.root), config)
    assert (len(sampled), none, len(begun)) == (2, [], 2)
    assert sampled[0] < begun[1]


def test_a_finished_run_trains_no_further(prepared_workspace: Workspace) -> None:
    train_base(CONFIG, RUN, prepared_workspace, CPU)
    before = weights_digest(prepared_workspace)
    outputs = train_base(CONFIG, RUN, prepared_workspace, CPU)
    assert outputs["steps"] == 12
    assert weights_digest(prepared_workspace) == before


def test_a_run_in_fp8_learns_as_much_and_resumes_exactly_but_only_in_fp8(
    prepared_workspace: Workspace, undisturbed: Workspace
) -> None:
    config = replace(CONFIG, fp8=True)
    result = train_base(config, RUN, prepared_workspace, CPU)
    weights = weights_digest(prepared_workspace)
    assert weights != weights_digest(undisturbed)
    assert abs(result["epoch/bpb"] - results(undisturbed)[-1]["epoch/bpb"]) < 0.05
    shutil.rmtree(prepared_workspace.checkpoints("base", "tiny") / "step_000012")
    with pytest.raises(UsageError, match="dtype float32 with fp8 → float32"):
        train_base(CONFIG, RUN, prepared_workspace, CPU)
    train_base(config, RUN, prepared_workspace, CPU)
    assert weights_digest(prepared_workspace) == weights


def test_a_checkpoint_is_never_continued_with_other_settings(prepared_workspace: Workspace) -> None:
    train_base(replace(CONFIG, num_steps=4), RUN, prepared_workspace, CPU)
    with pytest.raises(UsageError, match=r"seed 42 → 43.*--model-tag"):
        train_base(replace(CONFIG, num_steps=4, seed=43), RUN, prepared_workspace, CPU)


def broken_forward(steps: Collection[int]) -> Callable[[GPT, torch.Tensor, torch.Tensor | None], torch.Tensor]:
    """The model's forward with a loss that is not a number in the given steps."""
    calls = 0
    forward = GPT.forward

    def broken(self: GPT, tokens: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        nonlocal calls
        loss = forward(self, tokens, targets)
        if targets is not None:
            calls += 1
            return loss * float("nan") if calls in steps else loss
        return loss

    return broken


def test_a_step_without_a_finite_loss_changes_no_weight(
    prepared_workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GPT, "forward", broken_forward(range(4, 5)))
    train_base(CONFIG, RUN, prepared_workspace, CPU)
    rows = {row["step"]: row for row in results(prepared_workspace) if "batch/loss" in row}
    assert rows[3]["batch/skipped_steps"] == 0
    assert rows[4]["batch/skipped_steps"] == rows[12]["batch/skipped_steps"] == 1
    assert rows[12]["batch/loss"] < rows[1]["batch/loss"]


def test_a_run_whose_results_are_read_late_is_the_same_run(
    prepared_workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = Workspace(Path(shutil.copytree(prepared_workspace.root, tmp_path / "late")))
    for workspace, steps_ahead in ((prepared_workspace, 0), (late, 1)):
        with monkeypatch.context() as patch:
            patch.setitem(loop.STEPS_AHEAD, "cpu", steps_ahead)
            # 4 and 6 are read at once, for a save and an evaluation, the others when the next one is queued.
            patch.setattr(GPT, "forward", broken_forward([4, 6, 7, 10]))
            train_base(CONFIG, RUN, workspace, CPU)
    assert results(late)[-2]["batch/skipped_steps"] == 4
    # As text, in which the loss of a skipped step equals itself.
    assert str(results(late)) == str(results(prepared_workspace))
    for step in (8, 12):
        assert weights_digest(late, step) == weights_digest(prepared_workspace, step)
        ours, theirs = (
            load_checkpoint(workspace.checkpoints("base", "tiny"), step, "").state["progress"]
            for workspace in (late, prepared_workspace)
        )
        assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}


def test_the_seconds_of_the_steps_add_up_to_those_of_the_run(
    prepared_workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(loop.STEPS_AHEAD, "cpu", 1)
    train_base(CONFIG, RUN, prepared_workspace, CPU)
    rows = [row for row in read(metrics_path(prepared_workspace, RUN, "base", "tiny")) if "batch/loss" in row]
    steps = itertools.accumulate(row["batch/step_seconds"] for row in rows)
    assert [row["batch/train_seconds"] for row in rows] == pytest.approx(list(steps))


class NothingIsRead(TorchDispatchMode):
    """While entered, no value of a tensor may reach the host, for which it would have to wait for a GPU."""

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert operator.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)
        return operator(*args, **(kwargs or {}))


class NothingIsListed(TorchFunctionMode):
    """The same for `tolist`, which is no operator."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function is not torch.Tensor.tolist
        return function(*args, **(kwargs or {}))


def test_nothing_is_read_back_while_a_step_is_queued(
    prepared_workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue_step, queued = loop._queue_step, []

    def watched(*arguments: Any) -> Any:
        with NothingIsRead(), NothingIsListed():
            queued.append(1)
            return queue_step(*arguments)

    monkeypatch.setattr(loop, "_queue_step", watched)
    train_base(replace(CONFIG, num_steps=2), RUN, prepared_workspace, CPU)
    assert len(queued) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compile_mode", ["off", "on"])
def test_a_step_never_waits_for_the_gpu(
    compile_mode: Literal["off", "on"], prepared_workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue_step, queued = loop._queue_step, []

    def watched(*arguments: Any) -> Any:
        # The first steps compile and set up libraries.
        torch.cuda.set_sync_debug_mode("error" if len(queued) >= 2 else "default")
        try:
            queued.append(1)
            return queue_step(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(loop, "_queue_step", watched)
    runtime = Runtime(torch.device("cuda", 0), torch.bfloat16)
    train_base(replace(CONFIG, compile=compile_mode), RUN, prepared_workspace, runtime)
    assert len(queued) == 12


def test_the_time_that_is_left_forgets_a_first_step_that_compiled(
    prepared_workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forward, waits = GPT.forward, [60.0]
    clock = time.perf_counter
    skipped = 0.0

    def slow_at_first(model: GPT, *tokens: torch.Tensor) -> torch.Tensor:
        nonlocal skipped
        skipped += waits.pop() if waits else 0.0
        return forward(model, *tokens)

    monkeypatch.setattr(GPT, "forward", slow_at_first)
    monkeypatch.setattr(loop.time, "perf_counter", lambda: clock() + skipped)
    train_base(CONFIG, RUN, prepared_workspace, CPU)
    printed = [line for line in capsys.readouterr().out.splitlines() if " left=" in line]
    assert re.search(r"left=1[12] min", printed[0]), "of eleven steps as long as the only one"
    assert all(re.search(r"left=[\d.]+ s$", line) for line in printed[2:])


def test_a_model_whose_loss_has_lost_its_gradient_is_not_trained_on(
    prepared_workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a compiler has done that forgot half of the graph: the loss alone looks as always."""
    forward = GPT.forward

    def forgetful(model: GPT, *tokens: torch.Tensor) -> torch.Tensor:
        return forward(model, *tokens).detach() + 0 * model.lm_head.weight.sum()

    monkeypatch.setattr(GPT, "forward", forgetful)
    with pytest.raises(
        NanochatError, match=r"base would train nothing: the loss is 5.769, and its gradient 0"
    ) as raised:
        train_base(CONFIG, RUN, prepared_workspace, CPU)
    assert raised.value.fix.startswith("try --compile off")


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_a_run_that_diverged_stops_and_says_so(
    steps_ahead: int, prepared_workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(loop.STEPS_AHEAD, "cpu", steps_ahead)
    monkeypatch.setattr(GPT, "forward", broken_forward(range(2, 1000)))
    with pytest.raises(NanochatError, match="base diverged: 10 steps up to 11 "):
        train_base(CONFIG, RUN, prepared_workspace, CPU)


def test_a_stage_that_took_no_step_is_an_error(prepared_workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GPT, "forward", broken_forward(range(1, 1000)))
    with pytest.raises(NanochatError, match="took no optimizer step"):
        train_base(replace(CONFIG, num_steps=5), RUN, prepared_workspace, CPU)


def test_two_models_of_one_run_keep_their_metrics_apart(prepared_workspace: Workspace) -> None:
    first = train_base(CONFIG, RUN, prepared_workspace, CPU)
    other = train_base(replace(CONFIG, model_tag="other", depth=3), RUN, prepared_workspace, CPU)
    again = train_base(CONFIG, RUN, prepared_workspace, CPU)
    assert again["epoch/bpb"] == first["epoch/bpb"] != other["epoch/bpb"]


def test_a_run_that_starts_anew_forgets_the_metrics_of_the_one_before(prepared_workspace: Workspace) -> None:
    train_base(CONFIG, RUN, prepared_workspace, CPU)
    shutil.rmtree(prepared_workspace.checkpoints("base", "tiny"))
    train_base(replace(CONFIG, seed=7), RUN, prepared_workspace, CPU)
    rows = results(prepared_workspace)
    assert [row["step"] for row in rows if "epoch/bpb" in row] == [0, 6, 12]
    assert len([row for row in rows if "batch/loss" in row]) == 12


def test_a_run_does_not_pass_off_anothers_model_as_its_own(prepared_workspace: Workspace) -> None:
    train_base(replace(CONFIG, num_steps=2), RUN, prepared_workspace, CPU)
    with pytest.raises(UsageError, match="belongs to the run 'test-run'"):
        train_base(replace(CONFIG, num_steps=2), "another", prepared_workspace, CPU)


def test_a_changed_byte_of_the_tokens_is_found_before_the_first_step(prepared_workspace: Workspace) -> None:
    path = prepared_workspace.tokens / "train_00000.tokens.npy"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"train_00000\.tokens\.npy.*nanochat data tokenize"):
        train_base(CONFIG, RUN, prepared_workspace, CPU)


def test_tokens_of_another_tokenizer_are_refused(prepared_workspace: Workspace) -> None:
    train_tokenizer(["another text, " * 500], vocab_size=270, max_chars=10**5).save(prepared_workspace.tokenizer)
    with pytest.raises(DataError, match=r"was made with tokenizer.*nanochat data tokenize"):
        train_base(CONFIG, RUN, prepared_workspace, CPU)


def test_metrics_that_cannot_be_written_cost_rows_and_not_the_run(
    prepared_workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = MetricsLog.log

    def full_disk(self: MetricsLog, step: int, values: dict[str, float]) -> None:
        if step == 5:
            raise OSError(28, "No space left on device")
        log(self, step, values)

    monkeypatch.setattr(MetricsLog, "log", full_disk)
    train_base(CONFIG, RUN, prepared_workspace, CPU)
    assert "metrics of step 5 could not be written" in capsys.readouterr().err
    assert [row["step"] for row in results(prepared_workspace) if "batch/loss" in row] == [1, 2, 3, 4, *range(6, 13)]


def test_a_save_that_fails_in_mid_run_is_a_warning_and_the_next_one_is_tried(
    prepared_workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(prepared_workspace.root)
    calls = 0

    def full_at_first(path: Path) -> Any:
        nonlocal calls
        calls += 1
        return usage._replace(free=0) if calls == 1 else usage

    monkeypatch.setattr(shutil, "disk_usage", full_at_first)
    train_base(CONFIG, RUN, prepared_workspace, CPU)
    assert "checkpoint of step 4 could not be written" in capsys.readouterr().err
    assert list_steps(prepared_workspace.checkpoints("base", "tiny")) == [8, 12]


def test_the_last_save_must_succeed(prepared_workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(prepared_workspace.root)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    with pytest.raises(CheckpointNotSavedError, match="checkpoint of step 12"):
        train_base(CONFIG, RUN, prepared_workspace, CPU)


@pytest.mark.parametrize(
    "change",
    [
        {"remainders": "drop"},
        {"variant": "classic"},
    ],
)
def test_the_other_ways_to_train_learn_as_well(change: dict[str, Any], prepared_workspace: Workspace) -> None:
    train_base(replace(CONFIG, **change), RUN, prepared_workspace, CPU)
    losses = [row["batch/loss"] for row in results(prepared_workspace) if "batch/loss" in row]
    assert losses[-1] < losses[0]


@needs_compiler
def test_compiled_training_learns_keeps_its_code_and_resumes_exactly(
    prepared_workspace: Workspace,
    run_command: Callable[..., "subprocess.CompletedProcess[str]"],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # PyTorch may have set it in this process.
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    flags = "--depth 1 --aspect-ratio 32 --head-dim 16 --sequence-len 32 --lanes 4 --num-steps 3 --eval-tokens 256"
    batch = "--total-batch-size 128 --device-batch-size 4 --dtype float32 --wandb disabled --compile on --log-every 1"
    names = ("--run", RUN, "--model-tag", "tiny", "--save-every", "2")
    command = ("train", "base", *names, *flags.split(), *batch.split())
    result = run_command(*command, workspace=prepared_workspace.root)
    assert result.returncode == 0, result.stderr
    losses = [row["batch/loss"] for row in results(prepared_workspace) if "batch/loss" in row]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    assert list(prepared_workspace.cache.glob("inductor/**/*.so"))
    assert list(prepared_workspace.cache.glob("inductor/*/aotautograd/*")), "the traced backward pass"

    last = prepared_workspace.checkpoints("base", "tiny") / "step_000003"
    tensors = {path.name: path.read_bytes() for path in last.glob("*.safetensors")}
    shutil.rmtree(last)
    result = run_command(*command, workspace=prepared_workspace.root)
    assert "carrying on from step_000002" in result.stdout
    assert {path.name: path.read_bytes() for path in last.glob("*.safetensors")} == tensors
    assert len(tensors) == 2


def test_bfloat16_learns_and_keeps_float32_weights(prepared_workspace: Workspace) -> None:
    train_base(CONFIG, RUN, prepared_workspace, Runtime(torch.device("cpu"), torch.bfloat16))
    losses = [row["batch/loss"] for row in results(prepared_workspace) if "batch/loss" in row]
    assert losses[-1] < 0.7 * losses[0]
    checkpoint = load_checkpoint(prepared_workspace.checkpoints("base", "tiny"), 12, "")
    assert {weight.dtype for weight in checkpoint.model.values()} == {torch.float32}


def test_two_processes_never_write_one_model(prepared_workspace: Workspace) -> None:
    lock = lock_folder(prepared_workspace.checkpoints("base", "tiny"), "the model")
    with lock, pytest.raises(UsageError, match="is being written by another process"):
        train_base(CONFIG, RUN, prepared_workspace, CPU)
    train_base(replace(CONFIG, num_steps=1), RUN, prepared_workspace, CPU)

"""Preflight: nothing to say of a run that would work, and all that is wrong of every other, in documented words."""

import dataclasses
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.checkpoint.folders import checkpoint_folder
from nanochat.cluster.findings import Finding
from nanochat.cluster.preflight import (
    CHECKS,
    Request,
    check_quota,
    check_shared,
    checkpoint_bytes,
    examine,
    needed_room,
    parse_time_limit,
)
from nanochat.config import (
    ALL_STAGES,
    EvalConfig,
    RunConfig,
    TokenizerConfig,
    TrainBaseConfig,
    TrainMidConfig,
    TrainSFTConfig,
    model_from_depth,
)
from nanochat.corpus.local import build_local_corpus
from nanochat.corpus.shards import FIX_CORPUS
from nanochat.errors import UsageError
from nanochat.files import file_entry, read_json, write_json, write_manifest
from nanochat.loader.tokenize import tokenize_corpus
from nanochat.tasks.inventory import add_to_inventory
from nanochat.tasks.registry import STAGED
from nanochat.tokenizer.train import train_tokenizer
from nanochat.training.continuing import base_identity, identity_fields
from nanochat.workspace import Stage, Workspace
from texts import small_texts

ROOT = Path(__file__).parents[2]
GENERATOR = runpy.run_path(str(ROOT / "docs" / "generate_preflight_reference.py"))
KEY = "0123456789abcdef0123456789abcdef01234567"
ENVIRONMENT = {"HOME": tempfile.gettempdir()}

BASE = TrainBaseConfig(
    depth=2, aspect_ratio=16, head_dim=16, sequence_len=64, num_steps=12, total_batch_size=512, lanes=8
)
CONFIG = RunConfig(
    run="toy",
    data="existing",
    tokenizer=TokenizerConfig(vocab_size=320),
    base=BASE,
    mid=TrainMidConfig(tasks=("arithmetic:100",), num_steps=6, lanes=8),
    sft=TrainSFTConfig(tasks=("identity",), num_steps=4, batch_fraction=1.0, lanes=8),
    evaluation=EvalConfig(tasks=("arithmetic",)),
)


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in small_texts()))
    return folder


@pytest.fixture(scope="module")
def prepared(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A corpus, its tokenizer and its tokens."""
    workspace = Workspace(tmp_path_factory.mktemp("prepared"))
    build_local_corpus(text_folder, workspace.base_data, rows_per_shard=50)
    train_tokenizer(small_texts(), vocab_size=320, max_chars=10**6).save(workspace.tokenizer)
    tokenize_corpus(workspace.base_data, workspace.tokenizer, workspace.tokens, workers=1)
    return workspace


@pytest.fixture
def workspace(prepared: Workspace, tmp_path: Path) -> Workspace:
    return Workspace(Path(shutil.copytree(prepared.root, tmp_path / "workspace")))


def asked(workspace: Workspace, config: RunConfig = CONFIG, stages: str = "", **other: Any) -> Request:
    other.setdefault("environment", ENVIRONMENT)
    return Request(config, (stages,) if stages else (), workspace, **other)


def problems(request: Request) -> list[Finding]:
    """The problems found, each of which must be one that the reference lists."""
    found = [finding for finding in examine(request) if finding.state != "OK"]
    rows = GENERATOR["python_rows"]()
    for finding in found:
        assert any(row.fits(finding) for row in rows), f"not in the reference: {finding}"
        assert finding.fix, f"nothing mends: {finding}"
    return [finding for finding in found if finding.state == "PROBLEM"]


def the_problem(request: Request) -> Finding:
    (found,) = problems(request)
    return found


def leave_checkpoint(
    workspace: Workspace, stage: Stage, step: int, horizon: int, run: str = "toy", **identity: Any
) -> Path:
    """What preflight reads of a checkpoint."""
    folder = checkpoint_folder(workspace.checkpoints(stage, BASE.tag), step)
    write_json(folder / "config.json", {"run": run, "recipe": {"num_steps": horizon}, "identity": identity})
    write_manifest(folder, "checkpoint", [])
    return folder


def base_settings(workspace: Workspace, config: RunConfig = CONFIG) -> dict[str, Any]:
    request = asked(workspace, config, "base")
    assert request.recipe is not None
    tokenizer = read_json(workspace.tokenizer / "manifest.json")["tokenizer_fingerprint"]
    return {**base_identity(config.base, request.shape, request.recipe), "tokenizer": tokenizer}


def chat_settings(config: RunConfig = CONFIG) -> dict[str, Any]:
    return {**identity_fields(dataclasses.asdict(config.mid)), "tasks": list(config.mid.tasks)}


@pytest.mark.parametrize("stages", ["", "base", "base,mid", "tokenize,base", "report", "corpus"])
def test_a_run_that_would_work_has_no_problem(workspace: Workspace, stages: str) -> None:
    assert problems(asked(workspace, stages=stages)) == []


def test_nothing_is_written(tmp_path: Path) -> None:
    examine(asked(Workspace(tmp_path / "new")))
    assert not list(tmp_path.iterdir())


def test_everything_that_is_wrong_is_listed_at_once(tmp_path: Path) -> None:
    config = replace(CONFIG, run="dummy", mid=TrainMidConfig(lanes=6), sft=TrainSFTConfig(lanes=6))
    environment = {"WANDB_MODE": "online", "WANDB_DIR": str(tmp_path / "file")}
    (tmp_path / "file").touch()
    request = asked(Workspace(tmp_path / "new"), config, environment=environment, gpus_per_node=4, time_limit="90m")
    found = {finding.subject for finding in problems(request)}
    assert found == {"run name", "processes", "data", "task data", "W&B", "WANDB_DIR", "time"}


@pytest.mark.parametrize("name", ["", "dummy", " ", "a/b", "x" * 200])
def test_a_run_name_that_names_nothing_is_a_problem(workspace: Workspace, name: str) -> None:
    assert the_problem(asked(workspace, replace(CONFIG, run=name))).subject == "run name"


def test_an_unknown_stage_is_a_problem_and_all_are_checked(workspace: Workspace) -> None:
    assert "no stage 'finetune'" in the_problem(asked(workspace, stages="base,finetune")).text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"head_dim": 15}, "head dimension 15 is odd"),
        ({"depth": 0}, "has no layers"),
        ({"num_kv_heads": 3}, "cannot share 3 key/value heads"),
        ({"window_pattern": "X"}, "other than S and L"),
        ({"fp8": True, "sequence_len": 60}, "--fp8 needs a context that is a multiple of 16"),
        ({"total_batch_size": 100}, "not a whole number of rows"),
        ({"num_steps": None, "target_epochs": 1e-6}, "nothing would be trained"),
        ({"model_tag": "a/b"}, "not usable as a file name"),
    ],
)
def test_sizes_that_make_no_model_are_a_problem(workspace: Workspace, changes: dict[str, Any], said: str) -> None:
    found = problems(asked(workspace, replace(CONFIG, base=replace(BASE, **changes))))
    assert said in next(finding for finding in found if finding.subject == "model").text


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 16), st.integers(1, 16))
@settings(max_examples=30, deadline=None)
def test_processes_that_cannot_share_rows_or_lanes_are_named_with_numbers_that_can(
    nodes: int, gpus: int, rows: int, lanes: int
) -> None:
    config = replace(
        CONFIG,
        base=replace(BASE, total_batch_size=rows * 64, lanes=lanes),
        mid=replace(CONFIG.mid, batch_fraction=1.0, total_batch_size=64 * nodes * gpus, lanes=nodes * gpus),
    )
    request = asked(Workspace(Path("/nowhere")), config, "base,mid", nodes=nodes, gpus_per_node=gpus)
    found = [finding for finding in examine(request) if finding.subject == "processes" and finding.state != "OK"]
    fair = rows % (nodes * gpus) == 0 and lanes % (nodes * gpus) == 0
    assert len(found) == (not fair)
    if found:
        assert f"{nodes * gpus} ranks cannot share the {rows} rows and {lanes} lanes of base evenly" in found[0].text
        words = found[0].fix.removesuffix("; or use another number of devices").split()
        batch, new_lanes = (int(words[words.index(flag) + 1]) for flag in ("--total-batch-size", "--lanes"))
        better = replace(config, base=replace(config.base, total_batch_size=batch, lanes=new_lanes))
        assert all(
            finding.state == "OK"
            for finding in examine(replace(request, config=better))
            if finding.subject == "processes"
        )


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("file", "stages", "subject", "mends"),
    [
        ("base_data/shard_00000.parquet", "", "data", FIX_CORPUS),
        ("base_data/manifest.json", "tokenize", "data", "nanochat data adopt"),
        ("tokenizer/ranks.tiktoken", "base", "tokenizer", "nanochat tokenizer train"),
        ("tokenizer/manifest.json", "mid", "tokenizer", "nanochat tokenizer train"),
        ("tokens/train_00000.tokens.npy", "base", "tokens", "nanochat data tokenize"),
        ("tokens/manifest.json", "base", "tokens", "nanochat data tokenize"),
    ],
)
@pytest.mark.parametrize("damage", [Path.unlink, cut_short])
def test_what_is_missing_or_cut_short_is_named_with_the_command_that_makes_it(
    workspace: Workspace, file: str, stages: str, subject: str, mends: str, damage: Callable[[Path], None]
) -> None:
    damage(workspace.root / file)
    found = next(finding for finding in problems(asked(workspace, stages=stages)) if finding.subject == subject)
    assert str(workspace.root / Path(file).parent) in found.text
    assert found.fix == (FIX_CORPUS if damage is cut_short and subject == "data" else mends)


@pytest.mark.parametrize(
    ("file", "stages"), [("base_data/shard_00001.parquet", ""), ("tokens/train_00000.tokens.npy", "base")]
)
def test_a_flipped_bit_is_found_when_checksums_are_asked_for(workspace: Workspace, file: str, stages: str) -> None:
    flip(workspace.root / file)
    assert problems(asked(workspace, stages=stages)) == []
    assert "does not match its checksum" in the_problem(asked(workspace, stages=stages, checksums=True)).text


def test_a_folder_without_text_and_a_corpus_of_other_text_are_problems(
    workspace: Workspace, text_folder: Path, tmp_path: Path
) -> None:
    assert problems(asked(workspace, replace(CONFIG, data=str(text_folder)))) == []
    assert "is not a folder" in the_problem(asked(workspace, replace(CONFIG, data="/no/such/folder"))).text
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "cat.png").touch()
    assert "holds no text" in the_problem(asked(workspace, replace(CONFIG, data=str(tmp_path / "pictures")))).text
    assert "holds another corpus than builtin" in the_problem(asked(workspace, replace(CONFIG, data="builtin"))).text
    new = Workspace(tmp_path / "new")
    assert problems(asked(new, replace(CONFIG, data="builtin"))) == []


def test_a_vocabulary_that_no_tokenizer_has_is_a_problem(workspace: Workspace) -> None:
    found = problems(asked(workspace, replace(CONFIG, tokenizer=TokenizerConfig(vocab_size=100_000))))
    assert "100,000 is out of range" in next(finding for finding in found if finding.subject == "tokenizer").text
    found = problems(asked(workspace, replace(CONFIG, tokenizer=TokenizerConfig(vocab_size=320, digit_group=7))))
    assert "digit group 7" in found[0].text


def test_tokens_of_another_tokenizer_are_a_problem(workspace: Workspace) -> None:
    train_tokenizer(small_texts(), vocab_size=300, max_chars=10**6).save(workspace.tokenizer)
    assert "another tokenizer" in the_problem(asked(workspace, stages="base")).text
    assert problems(asked(workspace, stages="tokenize,base")) == []


def test_fewer_documents_than_lanes_are_a_problem(workspace: Workspace) -> None:
    config = replace(CONFIG, base=replace(BASE, lanes=10**6, total_batch_size=64 * 10**6))
    assert "documents for 1000000 lanes" in the_problem(asked(workspace, config, "base", checksums=True)).text


def test_missing_data_of_all_later_stages_is_named_in_one_command(workspace: Workspace) -> None:
    config = replace(CONFIG, mid=TrainMidConfig(lanes=8), sft=TrainSFTConfig(lanes=8), evaluation=EvalConfig())
    assert "nanochat stage smoltalk mmlu gsm8k arc-easy arc-challenge;" in the_problem(asked(workspace, config)).fix
    config = replace(CONFIG, mid=replace(CONFIG.mid, tasks=("gsm8k",)))
    assert "nanochat stage gsm8k" in the_problem(asked(workspace, config)).fix
    assert problems(asked(workspace, config, "base")) == []
    config = replace(CONFIG, evaluation=EvalConfig(tasks=("chess",)))
    assert "no task 'chess'" in the_problem(asked(workspace, config)).text


def test_what_was_staged_and_is_gone_is_named_with_the_command_that_brings_it(workspace: Workspace) -> None:
    folder = STAGED["gsm8k"][1].folder(workspace.task_data)
    names = ["main/train-0.parquet", "main/test-0.parquet"]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("rows of problems")
    files = [file_entry(folder / name, name=name) for name in names]
    add_to_inventory(workspace.inventory, "gsm8k", "nanochat stage gsm8k", folder, {}, files)
    config = replace(CONFIG, mid=replace(CONFIG.mid, tasks=("gsm8k",)))
    assert problems(asked(workspace, config)) == []
    flip(folder / names[1])
    assert problems(asked(workspace, config)) == []
    assert the_problem(asked(workspace, config, checksums=True)).fix == "nanochat stage gsm8k"
    (folder / names[0]).write_text("row")
    assert "has 3 bytes" in the_problem(asked(workspace, config)).text
    notes = [finding for finding in examine(asked(workspace)) if finding.state == "note"]
    assert [note.subject for note in notes] == ["staged files"], "a run that does not read it is told, and not stopped"
    workspace.inventory.write_text("{}")
    assert "inventory.json is damaged" in the_problem(asked(workspace)).text


def test_own_conversations_are_read_and_a_wrong_line_is_named(workspace: Workspace, tmp_path: Path) -> None:
    own = tmp_path / "own.jsonl"
    config = replace(CONFIG, mid=replace(CONFIG.mid, tasks=(f"jsonl={own}",)), evaluation=EvalConfig())
    assert "is not there" in the_problem(asked(workspace, config)).text
    talk = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    line = json.dumps(talk).encode()
    own.write_bytes(line + b"\n{}\n")
    assert f"{own} line 2" in the_problem(asked(workspace, config)).text
    own.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n" + line + b"\r\n")
    request = asked(workspace, config)
    assert problems(request) == []
    texts = [finding.text for finding in examine(request)]
    assert f"{own}: 2 conversations; a byte order mark and Windows line ends do no harm" in texts


def test_a_later_stage_needs_the_one_before_it_finished(workspace: Workspace) -> None:
    assert "holds no checkpoint for mid" in the_problem(asked(workspace, stages="mid")).text
    assert "no checkpoint of d2 to evaluate" in the_problem(asked(workspace, stages="eval")).text
    leave_checkpoint(workspace, "base", 6, 12)
    assert "is at step 6 of 12" in the_problem(asked(workspace, stages="mid")).text
    leave_checkpoint(workspace, "base", 12, 12)
    assert problems(asked(workspace, stages="mid")) == []
    assert problems(asked(workspace, stages="eval")) == []


def test_a_damaged_checkpoint_is_a_problem(workspace: Workspace) -> None:
    folder = leave_checkpoint(workspace, "base", 6, 12)
    (folder / "config.json").write_text("{")
    assert "config.json is damaged" in the_problem(asked(workspace, stages="mid")).text
    (folder / "manifest.json").unlink()
    assert "manifest.json is missing" in the_problem(asked(workspace, stages="base")).text


def test_a_checkpoint_of_this_very_run_is_carried_on(workspace: Workspace) -> None:
    leave_checkpoint(workspace, "base", 6, 12, **base_settings(workspace), dtype="bfloat16", data="unknown before")
    request = asked(workspace, stages="tokenize,base")
    assert problems(request) == []
    assert any("carries on from step 6 of 12" in finding.text for finding in examine(request))


def test_a_model_of_another_run_or_of_other_settings_is_a_problem(workspace: Workspace) -> None:
    leave_checkpoint(workspace, "base", 6, 12, run="other", **base_settings(workspace))
    assert "belongs to the run 'other'" in the_problem(asked(workspace, stages="base")).text
    leave_checkpoint(workspace, "base", 7, 12, **{**base_settings(workspace), "matrix_lr": 0.5})
    assert "matrix_lr 0.5 → 0.02" in the_problem(asked(workspace, stages="base")).text
    leave_checkpoint(workspace, "base", 12, 12, **base_settings(workspace), data="other tokens")
    assert "data other tokens → " in the_problem(asked(workspace, stages="base")).text
    leave_checkpoint(workspace, "mid", 3, 6, **{**chat_settings(), "lr_fraction": 9.0})
    assert "lr_fraction 9.0 → 1.0" in the_problem(asked(workspace, stages="mid")).text
    leave_checkpoint(workspace, "mid", 4, 6, **chat_settings(), source_checkpoint="another")
    assert "source_checkpoint another → " in the_problem(asked(workspace, stages="mid")).text


@pytest.mark.parametrize(
    ("variables", "mode", "said"),
    [
        ({"WANDB_MODE": "loud"}, "auto", "WANDB_MODE='loud'"),
        ({"WANDB_MODE": "online"}, "auto", "there is no key"),
        ({}, "online", "there is no key"),
        ({"WANDB_API_KEY": KEY[1:]}, "auto", "has 39 characters"),
        ({"WANDB_API_KEY": f"{KEY} "}, "auto", "ends with a blank"),
    ],
)
def test_what_wandb_would_refuse_is_a_problem_and_no_key_is_shown(
    workspace: Workspace, variables: dict[str, str], mode: Any, said: str
) -> None:
    request = asked(
        workspace, replace(CONFIG, base=replace(BASE, wandb=mode)), environment={**ENVIRONMENT, **variables}
    )
    assert said in the_problem(request).text
    assert KEY[1:] not in str(examine(request))


def test_wandbs_folder_must_be_writable_unless_nothing_is_recorded(workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    environment = {**ENVIRONMENT, "WANDB_DIR": str(tmp_path / "file" / "wandb")}
    assert the_problem(asked(workspace, environment=environment)).subject == "WANDB_DIR"
    assert problems(asked(workspace, environment={**environment, "WANDB_MODE": "disabled"})) == []


def test_a_folder_that_other_machines_do_not_see_is_told(workspace: Workspace) -> None:
    def found(folder: str, **where: Any) -> list[str]:
        return [finding.state for finding in check_shared(asked(workspace, **where), "WANDB_DIR", Path(folder), "fix")]

    assert found("/tmp/wandb") == []
    assert found("/tmp/wandb", time_limit="60") == found("/tmp/wandb", nodes=2) == ["note"]
    assert found("/scratch/me/wandb", nodes=2) == []
    memory = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines() if " tmpfs " in line]
    if memory:
        assert found(f"{memory[0]}/wandb", nodes=2) == ["PROBLEM"]


def test_too_little_room_or_quota_is_a_problem(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    huge = replace(BASE, aspect_ratio=64, depth=200, num_steps=1, keep_checkpoints=10**6)
    assert the_problem(asked(workspace, replace(CONFIG, base=huge), "base")).subject == "NANOCHAT_BASE_DIR"
    monkeypatch.setattr("nanochat.cluster.preflight.OTHER_FILES", 10**12)
    assert "inodes" in next(finding.text for finding in problems(asked(workspace)) if finding.subject == "room")


@pytest.mark.parametrize(
    ("listing", "said"),
    [
        ("", []),
        ("/scratch  1000 0 0 0 10 0 0 0\n", []),
        ("     /scratch  1048576 0 4194304 - 10 0 1000 -\n", ["3.00 GiB left"]),
        ("     /scratch  4194304* 4194304 5242880 6d23h 10 0 0 -\n", ["your quota leaves 1.00 GiB, about 2.00 GiB"]),
        ("Disk quotas for user me (uid 7):\n  Filesystem space\n/dev/sda 1 0 0 0 95* 90 100 0\n", ["leaves 5 files"]),
        ("[/scratch] [5242880]* 0 4194304 - 10 0 0 -\n", ["your quota leaves 0 B"]),
    ],
)
def test_quotas_are_read_from_what_the_commands_print(listing: str, said: list[str]) -> None:
    found = list(check_quota(listing, needed=2 * 2**30, files=10))
    assert len(found) == len(said)
    assert all(text in finding.text for finding, text in zip(found, said))
    assert all((finding.state == "PROBLEM") == ("leaves" in finding.text) for finding in found)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90", timedelta(minutes=90)),
        ("90:30", timedelta(minutes=90, seconds=30)),
        ("12:00:00", timedelta(hours=12)),
        ("2-12", timedelta(days=2, hours=12)),
        ("2-12:30", timedelta(days=2, hours=12, minutes=30)),
        ("1-00:00:01", timedelta(days=1, seconds=1)),
    ],
)
def test_all_of_slurms_forms_of_time_are_read(text: str, expected: timedelta) -> None:
    assert parse_time_limit(text) == expected.total_seconds()


def test_no_limit_is_none_and_anything_else_is_refused() -> None:
    assert parse_time_limit("UNLIMITED") is parse_time_limit("infinite") is parse_time_limit("0") is None
    for text in ("90m", "abc", "", "1:2:3:4", "1-", "-5"):
        with pytest.raises(UsageError, match="not a time that Slurm reads"):
            parse_time_limit(text)


def test_a_limit_that_only_ends_the_training_is_a_note_and_one_before_its_first_checkpoint_a_problem(
    workspace: Workspace,
) -> None:
    config = replace(CONFIG, base=replace(BASE, num_steps=1000, save_every=10))
    # At 10⁻⁴ TFLOP/s a step of this model takes about a second.
    slow = {"time_limit": "1", "gpu_tflops": 1e-4}
    assert problems(asked(workspace, config, "base", **slow)) == []
    found = [finding for finding in examine(asked(workspace, config, "base", **slow)) if finding.subject == "time"]
    assert [finding.state for finding in found] == ["note"]
    assert "the same command carries on" in found[0].fix
    seldom = replace(config, base=replace(config.base, save_every=0))
    finding = the_problem(asked(workspace, seldom, "base", **slow))
    assert "cut off before its first checkpoint" in finding.text
    often = replace(config, base=replace(config.base, save_every=int(finding.fix.removeprefix("--save-every "))))
    assert problems(asked(workspace, often, "base", **slow)) == []
    hopeless = the_problem(asked(workspace, seldom, "base", time_limit="1", gpu_tflops=1e-8))
    assert hopeless.fix == "ask for more GPUs or a longer time limit"
    assert problems(asked(workspace, seldom, "base", **slow, gpus_per_node=0)) == []


def test_room_is_estimated_from_checkpoints_as_they_are_written(workspace: Workspace) -> None:
    from nanochat.model.gpt import GPT
    from nanochat.optim.optimizer import ShardedOptimizer
    from nanochat.training.groups import parameter_groups

    request = asked(workspace, stages="base")
    assert request.recipe is not None
    model = GPT(request.shape)
    state = ShardedOptimizer(parameter_groups(model, BASE, request.recipe)).state_dict()
    written = sum(tensor.nbytes for tensor in [*model.state_dict().values(), *state.values()])
    assert written / checkpoint_bytes(request.shape) == pytest.approx(1, abs=0.05)
    before, _ = needed_room(request)
    (leave_checkpoint(workspace, "base", 6, 12) / "model.safetensors").write_bytes(bytes(10_000))
    assert needed_room(request)[0] < before


@pytest.mark.parametrize("depth", [12, 20])
def test_a_checkpoint_of_a_real_model_is_some_gigabytes(depth: int) -> None:
    shape = model_from_depth(depth, 32768, 2048)
    assert 2 < checkpoint_bytes(shape) / 1e9 < 12


@pytest.mark.parametrize("numbers", [{"nodes": 0}, {"gpus_per_node": -1}, {"gpu_tflops": 0.0}])
def test_a_machine_that_cannot_be_is_refused(workspace: Workspace, numbers: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        asked(workspace, **numbers)


def run(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "nanochat", "preflight", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_ends_with_3_if_there_is_a_problem_and_0_if_not(workspace: Workspace) -> None:
    flags = ["--depth", "2", "--mid.tasks", "arithmetic", "--sft.tasks", "identity", "--vocab-size", "320"]
    good = run(*flags, "--run", "toy", NANOCHAT_BASE_DIR=str(workspace.root))
    assert good.returncode == 0, good.stdout + good.stderr
    assert "PROBLEM" not in good.stdout
    bad = run(*flags, NANOCHAT_BASE_DIR=str(workspace.root), WANDB_RUN="dummy")
    assert bad.returncode == 3
    assert "PROBLEM  run name" in bad.stdout
    assert "1 of" in bad.stderr


def test_it_does_not_wait_for_torch() -> None:
    code = "import sys, nanochat.cluster.preflight; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"


def test_the_reference_is_current() -> None:
    page: Path = GENERATOR["PAGE"]
    current = page.read_text(encoding="utf-8") == GENERATOR["render"]()
    assert current, "docs/reference/preflight.md is out of date; run: python docs/generate_preflight_reference.py"


def test_the_reference_has_a_line_for_every_check() -> None:
    rows = GENERATOR["python_rows"]()
    assert len(rows) > 40
    assert {check.subject for check in CHECKS} <= {row.subject for row in rows}
    # A line of which nothing is known would fit everything.
    unknown = re.compile("<[^<>]+>")
    assert [row for row in rows if unknown.fullmatch(row.text) and unknown.fullmatch(row.fix)] == []


def test_the_reference_reads_calls_of_problem_in_a_shell_script() -> None:
    script = """
    fix="WANDB_RUN=my_run slurm/submit $KIND"
    problem "run name" "WANDB_RUN is \\"$WANDB_RUN\\"" "$fix"
    [[ $x ]] || problem "GPUs" "no node has $GPUS GPUs${TYPE:+ of type $TYPE}" \\
      "sed 's/a\\$//' $(printf %q "$file")"
    """
    first, second = GENERATOR["submit_rows"](script)
    assert (first.text, first.fix) == ('WANDB_RUN is "<WANDB_RUN>"', "WANDB_RUN=my_run slurm/submit <KIND>")
    assert (second.subject, second.text) == ("GPUs", "no node has <GPUS> GPUs<TYPE>")
    assert second.fix == "sed 's/a$//' <…>"


def test_all_stages_are_known_to_it() -> None:
    assert set(asked(Workspace(Path("/nowhere"))).chosen) == set(ALL_STAGES)

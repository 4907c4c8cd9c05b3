"""The whole pipeline at toy size: it does what is missing, only that, and a kill anywhere changes nothing."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nanochat.config import ALL_STAGES
from nanochat.tracking.keys import CLOCKED
from nanochat.tracking.metrics import read
from nanochat.tracking.runs import RunRecord
from texts import small_texts

Run = Callable[..., "subprocess.CompletedProcess[str]"]

FLAGS = [
    "speedrun",
    "--run",
    "toy",
    "--vocab-size",
    "320",
    "--depth",
    "2",
    "--aspect-ratio",
    "16",
    "--head-dim",
    "16",
    "--sequence-len",
    "64",
    "--lanes",
    "4",
    "--pool-size",
    "8",
    "--num-steps",
    "12",
    "--total-batch-size",
    "512",
    "--device-batch-size",
    "16",
    "--no-scale-hyperparameters",
    "--weight-decay",
    "0",
    "--eval-every",
    "6",
    "--eval-tokens",
    "1024",
    "--save-every",
    "3",
    "--log-every",
    "1",
    "--workers",
    "1",
    "--dtype",
    "float32",
    *("--mid.tasks", "arithmetic:200", "identity", "--mid.num-steps", "6", "--mid.save-every", "2"),
    *("--mid.lanes", "4", "--mid.pool-size", "8", "--mid.log-every", "1", "--mid.eval-tokens", "1024"),
    *("--sft.tasks", "arithmetic:100", "--sft.num-steps", "4", "--sft.save-every", "2"),
    *("--sft.batch-fraction", "1"),
    *("--sft.lanes", "4", "--sft.pool-size", "8", "--sft.log-every", "1", "--sft.eval-tokens", "1024"),
    *("--eval.tasks", "arithmetic", "library-kinds", "--eval.max-problems", "8", "--eval.max-new-tokens", "8"),
]
# How many steps each stage takes.
STEPS = {"base": 12, "mid": 6, "sft": 4}


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    lines = [json.dumps({"text": text}) for text in small_texts()]
    (folder / "texts.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def final_state(workspace: Path) -> dict[str, Any]:
    """Everything a run leaves that no clock decides."""
    digests = {
        str(path.relative_to(workspace)): hashlib.sha256(path.read_bytes()).hexdigest()
        for pattern in (
            "base_data/*.parquet",
            "tokenizer/config.json",
            "tokenizer/tokenizer.json",
            "tokenizer/*.tiktoken",
            "tokens/*.npy",
            "conversation_tokens/*/*.npy",
            "*_checkpoints/*/*/*.safetensors",
            "evaluations/*/*/*.json",
        )
        for path in sorted(workspace.glob(pattern))
    }
    metrics = {
        stage: [
            {key: value for key, value in json.loads(line).items() if key not in CLOCKED}
            for line in (workspace / f"runs/toy/{stage}/d2/metrics.jsonl").read_text().splitlines()
        ]
        for stage in STEPS
    }
    compared = json.loads((workspace / "report/sections/eval.json").read_text())["compared"]
    return {"files": digests, "metrics": metrics, "compared": compared}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, text_folder: Path) -> Path:
    """The workspace of an undisturbed run."""
    workspace = tmp_path_factory.mktemp("finished")
    result = subprocess.run(
        [sys.executable, "-m", "nanochat", *FLAGS, "--data", str(text_folder)],
        env={**os.environ, "NANOCHAT_BASE_DIR": str(workspace)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return workspace


def test_a_run_ends_with_a_report_of_every_stage(finished: Path) -> None:
    report = (finished / "report/report.md").read_text()
    for words in ("Corpus", "Tokenizer", "Tokens", "Base model", "base_loss.png", "Bits per byte", "torch"):
        assert words in report
    section = json.loads((finished / "report/sections/base.json").read_text())
    assert section["summary"]["Bits per byte"] < section["figures"]["Bits per byte of a byte-unigram model"]


def test_the_report_sets_the_stages_side_by_side(finished: Path) -> None:
    report = (finished / "report/report.md").read_text()
    assert "| Metric | BASE | MID | SFT |" in report
    [row] = [line for line in report.splitlines() if line.startswith("| library-kinds (n = 8)")]
    assert row.count("%") == 9, "an accuracy and the ends of its interval for each stage"
    assert "BASE: Who are you?" in report
    assert "SFT: Who are you?" in report


def test_every_stage_was_really_trained(finished: Path) -> None:
    for stage, steps in STEPS.items():
        losses = [row["batch/loss"] for row in final_state(finished)["metrics"][stage] if "batch/loss" in row]
        assert len(losses) == steps
        assert losses[-1] < losses[0]


def test_chat_stages_continue_from_a_finished_base(
    finished: Path, run_command: Run, text_folder: Path, tmp_path: Path
) -> None:
    workspace = tmp_path / "workspace"
    data = ["--data", str(text_folder)]
    first = run_command(*FLAGS, *data, "--stages", "corpus,tokenizer,tokenize,base", workspace=workspace)
    assert first.returncode == 0, first.stderr
    second = run_command(*FLAGS, *data, "--stages", "mid,sft,eval,report", workspace=workspace)
    assert second.returncode == 0, second.stderr
    assert final_state(workspace) == final_state(finished)


def test_a_base_model_that_was_trained_again_alike_changes_nothing_after_it(
    finished: Path, run_command: Run, text_folder: Path, tmp_path: Path
) -> None:
    workspace = Path(shutil.copytree(finished, tmp_path / "copy"))
    shutil.rmtree(workspace / "base_checkpoints")
    result = run_command(*FLAGS, "--data", str(text_folder), workspace=workspace)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("already done") == len(ALL_STAGES) - 2
    assert final_state(workspace) == final_state(finished)


def test_a_chat_model_is_never_built_on_another_base_than_it_began_with(
    finished: Path, run_command: Run, text_folder: Path, tmp_path: Path
) -> None:
    workspace = Path(shutil.copytree(finished, tmp_path / "copy"))
    shutil.rmtree(workspace / "base_checkpoints")
    result = run_command(*FLAGS, "--data", str(text_folder), "--matrix-lr", "0.01", workspace=workspace)
    assert result.returncode == 2
    assert "mid_checkpoints/d2 holds a run with other settings" in result.stderr
    assert "source_checkpoint" in result.stderr


def test_own_conversations_alone_make_a_chat_model(
    finished: Path, run_command: Run, text_folder: Path, tmp_path: Path
) -> None:
    workspace = Path(shutil.copytree(finished, tmp_path / "copy"))
    for folder in ("mid_checkpoints", "chatsft_checkpoints"):
        shutil.rmtree(workspace / folder)
    own = tmp_path / "own.jsonl"
    own.write_text(
        "".join(
            json.dumps({"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}]})
            + "\n"
            for n in range(100)
        )
    )
    drop = {"arithmetic:200", "identity", "--eval.tasks", "arithmetic", "library-kinds"}
    flags = [f"jsonl={own}" if flag == "arithmetic:100" else flag for flag in FLAGS if flag not in drop]
    flags.insert(flags.index("--mid.tasks") + 1, f"jsonl={own}")
    result = run_command(*flags, "--data", str(text_folder), workspace=workspace)
    assert result.returncode == 0, result.stderr
    assert "spelling" in (workspace / "report/report.md").read_text(), "examined with the default tasks"


def test_ranks_that_cannot_share_a_later_stage_are_refused_before_the_first_step(
    text_folder: Path, tmp_path: Path
) -> None:
    flags = [
        "0.125" if flag == "1" and FLAGS[at - 1] == "--sft.batch-fraction" else flag for at, flag in enumerate(FLAGS)
    ]
    result = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
            *("-m", "nanochat", "--", *flags, "--data", str(text_folder)),
        ],
        env={**os.environ, "NANOCHAT_BASE_DIR": str(tmp_path / "workspace")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    assert "2 ranks cannot share the 1 rows and 4 lanes of sft evenly" in result.stderr
    assert "--sft.total-batch-size 128" in result.stderr
    assert not list((tmp_path / "workspace").glob("base_checkpoints/*/step_*"))


def test_missing_task_data_is_noticed_before_anything_is_trained(
    run_command: Run, text_folder: Path, tmp_path: Path
) -> None:
    # Without the toy's own tasks: the defaults are those of a real model, and all that they need is named at once.
    flags = [flag for flag in FLAGS if flag not in ("--mid.tasks", "arithmetic:200", "identity", "--sft.tasks")]
    flags.remove("arithmetic:100")
    result = run_command(*flags, "--data", str(text_folder), workspace=tmp_path / "workspace")
    assert result.returncode == 4
    assert "nanochat stage smoltalk mmlu gsm8k arc-easy arc-challenge;" in result.stderr
    assert not (tmp_path / "workspace").exists()


def test_an_unknown_stage_is_refused_with_those_there_are(run_command: Run) -> None:
    result = run_command(*FLAGS, "--stages", "base,finetune")
    assert result.returncode == 2
    assert "no stage 'finetune'" in result.stderr
    assert "corpus,tokenizer,tokenize,base,mid,sft,eval,report" in result.stderr


def test_a_run_leaves_an_offline_wandb_run_of_each_stage_in_one_group(finished: Path) -> None:
    records = [RunRecord.read(finished / f"runs/toy/{stage}/d2") for stage in (*STEPS, "eval")]
    assert {record.names.group for record in records} == {"toy"}
    assert len({record.names.id for record in records}) == len(records)
    for record in records:
        assert list((finished / "wandb").glob(f"wandb/offline-run-*/run-{record.names.id}.wandb"))


def test_the_results_of_the_evaluation_are_tracked_too(finished: Path) -> None:
    rows = read(finished / "runs/toy/eval/d2/metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    stored = [json.loads(path.read_text()) for path in sorted(finished.glob("evaluations/sft/d2/*_chat.json"))]
    accuracy = stored[-1]["results"]["library-kinds"]["accuracy"]
    assert rows[2]["epoch/library-kinds"] == accuracy
    assert RunRecord.read(finished / "runs/toy/eval/d2").final["final/sft/library-kinds"] == accuracy


def test_preflight_knows_a_run_from_its_own_checkpoints(finished: Path, run_command: Run, text_folder: Path) -> None:
    flags = ["preflight", *FLAGS[1:], "--data", str(text_folder)]
    same = run_command(*flags, workspace=finished)
    assert same.returncode == 0, same.stdout
    assert same.stdout.count("finished, at step") == len(STEPS)
    other = run_command(*flags, "--matrix-lr", "0.01", "--sft.lr-fraction", "3", workspace=finished)
    assert other.returncode == 3
    assert "matrix_lr 0.02 → 0.01" in other.stdout
    assert "lr_fraction 0.8 → 3.0" in other.stdout


def test_a_second_run_does_nothing_twice(finished: Path, run_command: Run, text_folder: Path) -> None:
    before = final_state(finished)
    result = run_command(*FLAGS, "--data", str(text_folder), workspace=finished)
    assert result.returncode == 0
    assert result.stdout.count("already done") == len(ALL_STAGES) - 1
    assert final_state(finished) == before


def test_a_changed_setting_redoes_its_stage_and_what_depends_on_it(
    finished: Path, run_command: Run, text_folder: Path, tmp_path: Path
) -> None:
    workspace = Path(shutil.copytree(finished, tmp_path / "copy"))
    flags = ["288" if flag == "320" else flag for flag in FLAGS]
    result = run_command(*flags, "--data", str(text_folder), "--model-tag", "other", workspace=workspace)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("already done") == 1
    assert result.stdout.count("changed since it last ran") == 6
    assert json.loads((workspace / "tokenizer/config.json").read_text())["vocab_size"] == 288


@pytest.mark.parametrize("lost", ["tokens", "tokens/train_00000.tokens.npy", "tokenizer/ranks.tiktoken"])
def test_a_lost_product_is_made_again(
    lost: str, finished: Path, run_command: Run, text_folder: Path, tmp_path: Path
) -> None:
    workspace = Path(shutil.copytree(finished, tmp_path / "copy"))
    if lost == "tokens":
        shutil.rmtree(workspace / "tokens")
    else:
        (workspace / lost).unlink()
    result = run_command(*FLAGS, "--data", str(text_folder), workspace=workspace)
    assert result.returncode == 0, result.stderr
    assert "what it made" in result.stdout
    assert final_state(workspace) == final_state(finished)


def test_a_run_killed_in_every_stage_ends_as_if_undisturbed(
    finished: Path, run_command: Run, text_folder: Path, tmp_path: Path
) -> None:
    workspace = tmp_path / "workspace"
    for stage in ALL_STAGES:
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "nanochat", *FLAGS, "--data", str(text_folder)],
            env={**os.environ, "NANOCHAT_BASE_DIR": str(workspace)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        assert process.stdout is not None
        awaited = f"step 3/{STEPS[stage]}" if stage in STEPS else f"] {stage} …"
        assert any(awaited in line for line in process.stdout), stage
        time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, stage
    result = run_command(*FLAGS, "--data", str(text_folder), workspace=workspace)
    assert result.returncode == 0, result.stderr
    assert final_state(workspace) == final_state(finished)


def test_a_stop_signal_ends_with_the_code_for_requeue(run_command: Run, text_folder: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "workspace"
    flags = ["2000" if flag == "12" else flag for flag in FLAGS]
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "nanochat", *flags, "--data", str(text_folder)],
        env={**os.environ, "NANOCHAT_BASE_DIR": str(workspace)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "step 5/2000" in line:
            process.send_signal(signal.SIGUSR1)
            break
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "stopped at step" in errors
    assert "the same command carries on" in errors


def test_two_ranks_see_the_same_batches_and_end_at_the_same_loss(
    finished: Path, text_folder: Path, tmp_path: Path
) -> None:
    workspace = tmp_path / "workspace"
    result = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
            *("-m", "nanochat", "--", *FLAGS, "--data", str(text_folder)),
        ],
        env={**os.environ, "NANOCHAT_BASE_DIR": str(workspace)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    one, two = (
        [row["batch/loss"] for stage in STEPS for row in metrics[stage] if "batch/loss" in row]
        for metrics in (final_state(folder)["metrics"] for folder in (finished, workspace))
    )
    assert two[0] == pytest.approx(one[0], rel=1e-6)
    assert two == pytest.approx(one, rel=1e-2)


def test_a_folder_of_text_that_changed_is_noticed(
    finished: Path, run_command: Run, text_folder: Path, tmp_path: Path
) -> None:
    workspace = Path(shutil.copytree(finished, tmp_path / "copy"))
    folder = Path(shutil.copytree(text_folder, tmp_path / "text"))
    (folder / "more.txt").write_text("One more document. " * 20)
    result = run_command(*FLAGS, "--data", str(folder), workspace=workspace)
    assert result.returncode == 2
    assert f"rm -r {workspace / 'base_data'}" in result.stderr


def test_a_base_stage_without_tokens_names_the_command_that_makes_them(run_command: Run) -> None:
    result = run_command(*FLAGS, "--stages", "base")
    assert result.returncode == 4
    assert "nanochat data tokenize" in result.stderr

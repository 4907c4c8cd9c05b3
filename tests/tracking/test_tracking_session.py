"""What training itself leaves to be followed by, without a network."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from wandb_runs import console, history, read_back

from distributed import run_distributed
from nanochat.config import TrainBaseConfig
from nanochat.runtime import Runtime
from nanochat.tracking.runs import RunRecord, segments_of
from nanochat.tracking.transaction_log import read_log
from nanochat.training.base import train_base
from nanochat.workspace import Workspace

TINY = ["--depth", "1", "--head-dim", "32", "--aspect-ratio", "32", "--sequence-len", "32", "--model-tag", "tiny"]
TINY += ["--num-steps", "6", "--total-batch-size", "512", "--device-batch-size", "16", "--lanes", "8"]
TINY += ["--eval-every", "3", "--eval-tokens", "1024", "--save-every", "3", "--sample-every", "3", "--log-every", "1"]
OFFLINE = {"WANDB_MODE": "offline", "WANDB_X_DISABLE_STATS": "true", "SLURM_JOB_ID": "4711"}


@pytest.fixture(scope="module")
def trained(_prepared_workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, str]:
    """A workspace in which arm_a was trained, and what that printed."""
    workspace = Workspace(Path(shutil.copytree(_prepared_workspace, tmp_path_factory.mktemp("trained") / "workspace")))
    return workspace, nanochat(workspace, "train", "base", "--run", "arm_a", "--wandb-tags", "ablation", *TINY)


def nanochat(workspace: Workspace, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "nanochat", *arguments],
        env={**os.environ, **OFFLINE, **environment, "NANOCHAT_BASE_DIR": str(workspace.root)},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_one_needs_to_understand_a_run_is_in_wandbs_file(trained: tuple[Workspace, str]) -> None:
    workspace, printed = trained
    (segment,) = segments_of(workspace.wandb, "arm_a-base")
    records = read_back(segment.parent)
    (run,) = records["run"]
    config = run["config"]["update"]
    assert config["identity"]["depth"] == 1
    parts = [config[f"model/{part}_params_M"] for part in ("wte", "value_embeds", "lm_head", "matrices", "scalars")]
    assert config["model/total_params_M"] == pytest.approx(sum(parts))
    for key in ("data/tokens", "data/documents", "data/fingerprint", "runtime/git_commit", "runtime/device"):
        assert config[key]
    assert (config["slurm/job_id"], run["tags"]) == ("4711", ["tiny", "ablation"])
    assert run["display_name"].endswith("arm_a-base_4711")

    rows = {row["step"]: row for row in history(records)}
    lines = (workspace.run("arm_a") / "base/tiny/metrics.jsonl").read_text().splitlines()
    assert list(rows) == list(range(7))
    for row in map(json.loads, lines):
        assert rows[row["step"]].items() >= row.items()
    assert rows[6]["batch/iter_num"] == 6
    assert {"batch/lr/wte", "batch/lr/matrices", "batch/memory_reserved_GB", "batch/data_seconds"} <= rows[1].keys()
    assert "epoch/samples.path" in rows[3]
    assert set(printed.splitlines()) <= set(console(records).splitlines())


def train_on_ranks(root: str, config: TrainBaseConfig) -> None:
    """One rank's part of a run."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    train_base(config, "ranks", Workspace(Path(root)), Runtime(torch.device("cpu"), torch.float32, rank, world_size))


def test_two_ranks_are_one_run_told_by_the_first(prepared_workspace: Workspace) -> None:
    config = TrainBaseConfig(
        depth=1,
        head_dim=32,
        aspect_ratio=32,
        sequence_len=32,
        model_tag="tiny",
        num_steps=3,
        total_batch_size=512,
        device_batch_size=8,
        lanes=8,
        eval_tokens=1024,
        log_every=1,
        wandb="offline",
    )
    run_distributed(train_on_ranks, 2, str(prepared_workspace.root), config, timeout_s=200)
    (log,) = (prepared_workspace.wandb / "wandb").glob("*run-*/run-*.wandb")
    records = read_back(log.parent)
    assert [row["step"] for row in history(records)] == [0, 1, 2, 3]
    assert records["run"][0]["config"]["update"]["runtime/world_size"] == 2
    assert [record["exit_code"] for record in records["exit"]] == [0]


def test_the_record_beside_the_metrics_says_how_it_ended(trained: tuple[Workspace, str]) -> None:
    workspace, _ = trained
    record = RunRecord.read(workspace.run("arm_a") / "base/tiny")
    assert (record.state, record.num_steps, record.exit_code) == ("finished", 6, 0)
    assert record.final.keys() == {"final/bpb"}
    (segment,) = segments_of(workspace.wandb, record.names.id)
    assert read_log(segment)[-1].exit.exit_code == 0


def test_runs_compare_and_sync_read_what_training_left(trained: tuple[Workspace, str]) -> None:
    workspace, _ = trained
    other = [*TINY, "--log-every", "2", "--matrix-lr", "0.01", "--model-tag", "other"]
    nanochat(workspace, "train", "base", "--run", "arm_b", *other, WANDB_MODE="disabled")
    _, first, second = nanochat(workspace, "runs").splitlines()
    assert first.split()[:5] == ["arm_a", "base", "tiny", "finished", "6/6"]
    assert second.split()[:5] == ["arm_b", "base", "other", "finished", "6/6"]
    assert (first.split()[-1], second.split()[-1]) == ("no", "ago")
    said, page = nanochat(workspace, "compare", "arm_a", "arm_b").splitlines()
    assert "matrix_lr" in said
    assert "log_every" not in said
    assert "tokenizer" in said.partition("The same:")[2]
    assert (workspace.report / "compare/arm_a-vs-arm_b/index.html").samefile(page)
    lines = nanochat(workspace, "sync", "--dry-run").splitlines()
    assert [line.partition(", as")[0] for line in lines] == [
        "arm_a-base: would send: 7 rows",
        "arm_b-base: skipped: W&B was disabled",
    ]

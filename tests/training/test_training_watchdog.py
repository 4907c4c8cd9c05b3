"""A hang ends every rank, with the place where each one stands; what is merely slow is left alone."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from distributed import RankFailedError, run_distributed
from nanochat.errors import ExitCode
from nanochat.runtime import Runtime, made_progress, on_progress
from nanochat.training.watchdog import watched
from nanochat.workspace import Workspace

CPU = torch.device("cpu")
SECONDS = 1.2


def a_call_that_never_returns() -> None:
    time.sleep(60)


def a_collective_that_waits_for_all() -> None:
    dist.barrier()


def hang_on_rank_1(root: str) -> None:
    runtime = Runtime(CPU, torch.float32, dist.get_rank(), dist.get_world_size())
    with watched(Workspace(Path(root)), "run", "base", runtime, SECONDS / 60) as heartbeat:
        heartbeat.beat("running", step=7)
        if runtime.rank == 1:
            # A save may take longer, so that its own time is not up when that of the other is.
            heartbeat.beat("saving", step=7)
            a_call_that_never_returns()
        a_collective_that_waits_for_all()


def test_a_rank_that_hangs_ends_all_with_76_and_each_says_where_it_stands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RankFailedError) as failure:
        run_distributed(hang_on_rank_1, 2, str(tmp_path))
    assert [f"rank {rank}: died with exit code {ExitCode.STALLED.value}" for rank in range(2)] == str(
        failure.value
    ).splitlines()
    stacks = [(tmp_path / "runs" / "run" / "stacks" / f"rank-{rank}.txt").read_text() for rank in range(2)]
    assert "in a_collective_that_waits_for_all" in stacks[0]
    assert "in a_call_that_never_returns" in stacks[1]
    output = capsys.readouterr().out
    assert "base, running at step 7" in output
    assert "in a_call_that_never_returns" in output
    heartbeat = json.loads((tmp_path / "runs" / "run" / "heartbeat.json").read_text())
    assert heartbeat["state"] == "failed"
    assert "finished nothing" in heartbeat["message"]


def move_slowly(root: str) -> None:
    with watched(Workspace(Path(root)), "run", "base", Runtime(CPU, torch.float32), 3 / 60) as heartbeat:
        # Longer than a step may take, as compiling and writing a checkpoint do.
        time.sleep(3.5)
        heartbeat.beat("evaluating")
        for _ in range(5):
            time.sleep(0.7)
            made_progress()
    assert on_progress == []


def test_what_is_slow_but_moves_is_left_alone(tmp_path: Path) -> None:
    run_distributed(move_slowly, 1, str(tmp_path))
    assert not (tmp_path / "runs" / "run" / "stacks").exists()


def work_beside_old_stacks(root: str) -> str:
    with watched(Workspace(Path(root)), "run", "base", Runtime(CPU, torch.float32), 2 / 60):
        # Somebody reads them in an editor, which makes a file of its own, and deletes them.
        stacks = Workspace(Path(root)).run("run") / "stacks"
        (stacks / ".rank-1.txt.swp").write_text("")
        time.sleep(0.5)
        (stacks / "rank-1.txt").unlink()
        time.sleep(0.5)
    return "moved on"


def test_stacks_that_an_earlier_hang_left_may_be_read_and_deleted_and_end_nobody(tmp_path: Path) -> None:
    stacks = tmp_path / "runs" / "run" / "stacks"
    stacks.mkdir(parents=True)
    (stacks / "rank-1.txt").write_text("old")
    assert run_distributed(work_beside_old_stacks, 1, str(tmp_path)) == ["moved on"]


def test_without_minutes_nothing_is_a_hang(tmp_path: Path) -> None:
    with watched(Workspace(tmp_path), "run", "base", Runtime(CPU, torch.float32), 0) as heartbeat:
        heartbeat.beat("running")
        time.sleep(0.3)
    assert not (tmp_path / "runs" / "run" / "stacks").exists()


HOLDS_THE_INTERPRETER = """
import ctypes, sys, time, torch
from pathlib import Path
from nanochat.runtime import Runtime
from nanochat.training import watchdog
from nanochat.workspace import Workspace
watchdog.SPARE_SECONDS = 0.5

def a_call_that_keeps_the_lock():
    ctypes.PyDLL(None).sleep(60)

runtime = Runtime(torch.device("cpu"), torch.float32)
with watchdog.watched(Workspace(Path(sys.argv[1])), "run", "base", runtime, 0.01) as heartbeat:
    heartbeat.beat("running")
    # Long enough for a look, at which the clock that needs no lock is set.
    time.sleep(0.3)
    a_call_that_keeps_the_lock()
"""


def test_a_call_that_keeps_the_interpreter_is_ended_and_shown_too(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HOLDS_THE_INTERPRETER, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
    )
    assert done.returncode == 1
    assert "in a_call_that_keeps_the_lock" in done.stderr

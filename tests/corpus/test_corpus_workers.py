"""Work on several processes: all of it is done, and none stays behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from nanochat.corpus.workers import run_tasks
from nanochat.errors import DataError, NanochatError, UsageError


def square(number: int) -> int:
    return number * number


def fail(number: int) -> int:
    raise DataError(f"number {number} is damaged", "take another")


def die(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("workers", [1, 2])
def test_every_task_is_done_once(workers: int) -> None:
    assert dict(run_tasks(square, range(5), workers, "squared")) == {number: number**2 for number in range(5)}
    assert dict(run_tasks(square, [], workers, "squared")) == {}


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_a_worker_comes_through_as_it_is(workers: int) -> None:
    with pytest.raises(DataError, match="is damaged — take another"):
        list(run_tasks(fail, [1, 2], workers, "failed"))


def test_a_killed_worker_is_one_line() -> None:
    with pytest.raises(NanochatError, match=r"a worker that died was killed.*fewer --workers"):
        list(run_tasks(die, [1, 2], 2, "died"))


def test_no_workers_are_refused() -> None:
    with pytest.raises(UsageError, match="0 workers"):
        list(run_tasks(square, [1], 0, "squared"))


SLEEPER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from nanochat.corpus.workers import run_tasks

if __name__ == "__main__":
    list(run_tasks(time.sleep, [100.0, 100.0], 2, "slept"))
"""


def test_workers_end_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    script = tmp_path / "sleeper.py"
    script.write_text(SLEEPER)
    parent = subprocess.Popen([sys.executable, str(script), str(tmp_path)], start_new_session=True)
    deadline = time.monotonic() + 60
    workers: list[psutil.Process] = []
    # Two workers and the process that tracks their semaphores.
    while len(workers) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
        workers = psutil.Process(parent.pid).children()
    # Until they sleep, and so are past their start.
    time.sleep(1.0)
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert alive == []

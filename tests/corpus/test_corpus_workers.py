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
import signal, sys, time
sys.path.insert(0, sys.argv[1])
# A job in the background is started deaf to it.
signal.signal(signal.SIGINT, signal.default_int_handler)
from nanochat.corpus.workers import run_tasks

if __name__ == "__main__":
    list(run_tasks(time.sleep, [100.0, 100.0], 2, "slept"))
"""


def sleeping(tmp_path: Path) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """A process whose two workers sleep, alone in a process group, and all that it has started."""
    script = tmp_path / "sleeper.py"
    script.write_text(SLEEPER)
    command = [sys.executable, str(script), str(tmp_path)]
    parent = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    children: list[psutil.Process] = []
    # Two workers and the process that tracks their semaphores.
    while len(children) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
        children = psutil.Process(parent.pid).children()
    # Until they sleep, and so are past their start.
    time.sleep(1.0)
    return parent, children


def test_workers_end_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    parent, children = sleeping(tmp_path)
    parent.kill()
    parent.communicate()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert alive == []


def test_ctrl_c_ends_workers_amid_their_tasks_and_none_has_anything_to_say(tmp_path: Path) -> None:
    parent, children = sleeping(tmp_path)
    os.killpg(parent.pid, signal.SIGINT)
    errors = parent.communicate(timeout=30)[1]
    _, alive = psutil.wait_procs(children, timeout=30)
    assert alive == []
    assert errors.count("Traceback") == errors.count("KeyboardInterrupt") == 1

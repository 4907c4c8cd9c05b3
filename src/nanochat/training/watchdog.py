"""A hang costs minutes: when nothing is finished for too long, every rank says where it stands and the process ends.

A hang is a rank that waits for ever: in a collective that another rank never enters, for a file system, for a GPU. It
raises nothing, so a thread watches the time since the last piece of work. It ends the process with `os._exit`, as
the main thread is stuck in C and no exception would ever reach it.

The thread needs Python's lock, which C code that hangs could hold. Then the C thread of `faulthandler` acts instead,
which needs none: it too shows the stacks, but it can only end the process with 1.
"""

import faulthandler
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread

from nanochat.errors import ExitCode
from nanochat.files import whole_file
from nanochat.runtime import Runtime, on_progress
from nanochat.training.heartbeat import Heartbeat, State, beating, last_words
from nanochat.workspace import Workspace

# Compiling in the first step, and writing a checkpoint to a slow file system, take much longer than a step.
LONGER = 4
SLOW: tuple[State, ...] = ("starting", "saving")

SECONDS_BETWEEN_LOOKS = 5.0
# How much longer the C thread waits for the Python thread, and how long the latter may take to write.
SPARE_SECONDS = 60.0


class Watchdog:
    """While entered, ends the process if it is not fed.

    The first rank whose time is up writes its stacks to the run's folder. The others see that and write theirs,
    even if their own time is not up, before the first one ends and the launcher kills them all.

    Args:
        folder: for the stacks, `rank-N.txt`; the same for all ranks.
        runtime: which rank this is.
        minutes: how long without food; 0 for ever.
        doing: says what the process does, for the message.
    """

    def __init__(self, folder: Path, runtime: Runtime, minutes: float, doing: Callable[[], str]) -> None:
        self._folder = folder
        self._runtime = runtime
        self._seconds = minutes * 60
        self._doing = doing
        self._between_looks = min(SECONDS_BETWEEN_LOOKS, self._seconds / 8)
        self._left = Event()
        self._thread = Thread(target=self._watch, name="watchdog", daemon=True)
        self.feed()

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            self._seen = self._stacks()
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        if self._seconds:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def feed(self, state: State = "starting") -> float:
        """Say that something was finished. Returns the seconds that the next piece may take, 0 for any."""
        allowed = self._seconds * (LONGER if state in SLOW else 1)
        self._fed = time.monotonic()
        self._deadline = self._fed + allowed
        return allowed

    def _watch(self) -> None:
        while not self._left.wait(self._between_looks):
            left = self._deadline - time.monotonic()
            faulthandler.dump_traceback_later(max(0.0, left) + SPARE_SECONDS, exit=True, file=_stderr())
            if left < 0:
                quiet = time.monotonic() - self._fed
                self._end(f"finished nothing for {quiet / 60:.1f} minutes")
            elif self._stacks() - self._seen:
                self._end("ends because another rank hangs")

    def _stacks(self) -> set[tuple[str, int]]:
        """The stacks that lie there, and since when: whoever reads or deletes those of an earlier hang ends nobody."""
        found = set()
        with suppress(OSError):
            for path in self._folder.glob("rank-*.txt"):
                with suppress(FileNotFoundError):
                    found.add((path.name, path.stat().st_mtime_ns))
        return found

    def _end(self, why: str) -> None:
        path = self._folder / f"rank-{self._runtime.rank}.txt"
        message = f"rank {self._runtime.rank} {why} ({self._doing()}); where it stands is in {path}"
        stderr = _stderr()
        # The file system may be what hangs, so what needs it comes last, and against the clock.
        faulthandler.dump_traceback_later(SPARE_SECONDS, exit=True, file=stderr)
        os.write(stderr, f"nanochat: {message} — the same command carries on\n".encode())
        faulthandler.dump_traceback(stderr, all_threads=True)
        with suppress(OSError), whole_file(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
            stream.write(f"{time.ctime()}, {socket.gethostname()}, process {os.getpid()}: {message}\n\n")
            stream.flush()
            faulthandler.dump_traceback(stream, all_threads=True)
        last_words("failed", message)
        if self._runtime.world_size > 1:
            time.sleep(3 * self._between_looks)
        os._exit(ExitCode.STALLED)


@contextmanager
def watched(workspace: Workspace, run: str, stage: str, runtime: Runtime, minutes: float) -> Iterator[Heartbeat]:
    """A stage's heartbeat, each beat of which feeds a watchdog, on every rank.

    Evaluations feed both after each batch, through `runtime.made_progress`.

    Args:
        minutes: how long nothing may be finished; 0 for ever.
    """
    folder = workspace.run(run)
    with (
        beating(folder if runtime.is_main else None, stage) as heartbeat,
        Watchdog(folder / "stacks", runtime, minutes, lambda: heartbeat.doing) as watchdog,
    ):
        heartbeat.on_beat = watchdog.feed
        heartbeat.beat()
        on_progress.append(heartbeat.beat)
        try:
            yield heartbeat
        finally:
            on_progress.remove(heartbeat.beat)
            heartbeat.on_beat = None
            heartbeat.beat(silence=None)


def _stderr() -> int:
    """Where a message can be written without a lock: tests and notebooks replace `sys.stderr` by what has no file."""
    return sys.__stderr__.fileno() if sys.__stderr__ is not None else 2

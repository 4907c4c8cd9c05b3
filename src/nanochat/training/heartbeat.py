"""What a run says of itself while it works: `runs/<run>/heartbeat.json`, for `nanochat status` and whoever looks.

Rank 0 writes it every few seconds, at a step, never from a thread of its own: a heartbeat that goes on while the work
has stopped would hide what it is there to show. It is renamed into place like every file, but not flushed to disk,
since after a power loss it has nothing to tell.
"""

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from nanochat.errors import NanochatError, StoppedForRequeueError, StopSignal
from nanochat.files import temporary_sibling
from nanochat.tracking.metrics import to_json_value

State = Literal["starting", "running", "evaluating", "saving", "stopped", "finished", "failed"]
ENDED: tuple[State, ...] = ("stopped", "finished", "failed")

FILE_NAME = "heartbeat.json"
SECONDS_BETWEEN_BEATS = 5.0

# A run that takes steps is expected to take the next one within ten times as long as the last, or this long.
SILENCE_SECONDS = 120.0
SILENCE_STEPS = 10

# The heartbeat of the run that this process works on; stages within a run join it.
_current: "Heartbeat | None" = None


class Heartbeat:
    """A run's heartbeat.

    Args:
        path: the file; None to write nothing, on all ranks but the first.
        stage: what the run begins with.

    Attributes:
        on_beat: told of every beat; answers how many seconds may pass until the next one in this state, 0 for any.
    """

    def __init__(self, path: Path | None, stage: str) -> None:
        self.on_beat: Callable[[State], float] | None = None
        self._path = path
        self._written = 0.0
        self.enter(stage)

    @property
    def doing(self) -> str:
        """The stage, and what it does there, for a message."""
        step = f" at step {self._fields['step']}" if "step" in self._fields else ""
        return f"{self._fields['stage']}, {self._fields['state']}{step}"

    def enter(self, stage: str) -> None:
        """Begin a stage; what was said of the one before is forgotten."""
        self._fields: dict[str, Any] = {"state": "starting", "silence": None, "stage": stage, **_process()}
        self._write()

    def beat(self, state: State | None = None, **fields: Any) -> None:
        """Say that the run moves.

        Args:
            state: what it does now, if that is something else; said at once, and the rest every few seconds.
            fields: what else changed, JSON-able: step, loss, step_seconds and the like.
        """
        changed = state is not None and state != self._fields["state"]
        self._fields.update(fields, **({"state": state} if state else {}))
        if self.on_beat is not None:
            self._fields["silence"] = self._silence(self.on_beat(self._fields["state"]))
        if changed or time.monotonic() - self._written >= SECONDS_BETWEEN_BEATS:
            self._write()

    def end(self, state: State, message: str = "") -> None:
        """Say how the run ended."""
        self._fields.update(state=state, message=message, silence=None)
        self._write()

    def _silence(self, allowed: float) -> float | None:
        """Seconds without a beat after which the run counts as stalled: sooner than the watchdog, which ends it."""
        if self._fields["state"] == "running":
            soon: float = max(SILENCE_SECONDS, SILENCE_STEPS * self._fields.get("step_seconds", 0.0))
            return min(soon, allowed or soon)
        return allowed or None

    def _write(self) -> None:
        self._written = time.monotonic()
        if self._path is None:
            return
        temporary = temporary_sibling(self._path)
        # A full disk or a folder that went away must not cost the run.
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_text(json.dumps(to_json_value({**self._fields, "time": time.time()}), indent=2) + "\n")
                temporary.replace(self._path)
            finally:
                temporary.unlink(missing_ok=True)


@contextmanager
def beating(folder: Path | None, stage: str) -> Iterator[Heartbeat]:
    """A heartbeat for a stage: a run's own, or that of the run it is a part of. At the end it says how it ended.

    Args:
        folder: the run's; None on all ranks but the first.
        stage: its name.
    """
    global _current
    if _current is not None:
        _current.enter(stage)
        yield _current
        return
    _current = heartbeat = Heartbeat(None if folder is None else folder / FILE_NAME, stage)
    try:
        yield heartbeat
        heartbeat.end("finished")
    except (StoppedForRequeueError, KeyboardInterrupt) as stop:
        reason = stop.signal_name if isinstance(stop, StopSignal) else "Ctrl-C"
        heartbeat.end("stopped", str(stop) if isinstance(stop, NanochatError) else f"stopped by {reason}")
        raise
    except Exception as error:
        heartbeat.end("failed", str(error) if isinstance(error, NanochatError) else f"{type(error).__name__}: {error}")
        raise
    finally:
        _current = None


def tell(**fields: Any) -> None:
    """Have the run that this process works on beat, if it is one, from where its heartbeat is not at hand."""
    if _current is not None:
        _current.beat(**fields)


def last_words(state: State, message: str) -> None:
    """Have the heartbeat say how the run ended, if there is one, from a thread that is about to end the process."""
    if _current is not None:
        _current.end(state, message)


def job_id() -> str | None:
    """The Slurm job this process belongs to, as squeue names it: 12, or 12_3 of an array."""
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ.get('SLURM_ARRAY_TASK_ID', '')}"
    return os.environ.get("SLURM_JOB_ID")


def _process() -> dict[str, Any]:
    """Who beats, so that others can see whether it is still there; a process number alone is used again."""
    import psutil

    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process_started": psutil.Process().create_time(),
        "job": job_id(),
        "log": os.environ.get("NANOCHAT_LOG"),
    }

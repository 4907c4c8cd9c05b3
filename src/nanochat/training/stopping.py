"""What a stop signal does: inside the loop it is a wish that all ranks agree on, anywhere else the command ends now.

Slurm sends SIGTERM at scancel, preemption and the time limit, SIGUSR1 ahead of the limit where the job asked for it
(--signal), and often twice, as launchers pass on what the processes have received already. A person at a terminal sends
SIGINT.
"""

import math
import os
import select
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from types import FrameType, TracebackType
from typing import Any, Self

from nanochat.errors import ExitCode, NanochatError, StopSignal
from nanochat.training.heartbeat import last_words

SCHEDULER_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
STOP_SIGNALS = (*SCHEDULER_SIGNALS, signal.SIGINT)

# Slurm kills after 30 seconds by default (KillWait). Nothing outside of the loop needs long to end, but a call into C
# may not return for minutes, and some code takes every exception for one of its own.
GRACE_SECONDS = 10.0

# The first signal that asked this process to end, since the command began, and whether it was raised.
_received: str | None = None
_raised = False
# The loop that takes signals now.
_request: "StopRequest | None" = None


@contextmanager
def stops_at_once(*, last: bool = False) -> Iterator[None]:
    """While entered, SIGTERM and SIGUSR1 raise `StopSignal` in the main thread, once; further ones change nothing.

    If that has no effect within GRACE_SECONDS, the process ends without it. Nothing is lost: what is on disk is whole
    at any moment. SIGINT stays as it was.

    Args:
        last: the process ends thereafter. The second signal must not kill it on its way out, and with it the exit code.
    """
    global _received, _raised
    _received, _raised = None, False
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = {number: signal.signal(number, _raise_stop) for number in SCHEDULER_SIGNALS}
    # The C part of Python writes a signal's number here at once, even if the main thread is in a call that takes long.
    descriptor_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    Thread(target=_insist, args=(reader,), name="stop signals", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(descriptor_before)
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if last and received() else handler)
        os.close(writer)


def received() -> str | None:
    """The name of the signal that asked this process to end, if one did."""
    return _received


def lost_stop(error: Exception) -> StopSignal | None:
    """The stop that an unexpected error has taken the place of, if one was raised before.

    C code that calls Python may take every exception for one of its own: stopped in `torch.tensor`, for one, it says
    that it "could not determine the shape" of something.
    """
    if _raised and _received is not None and not isinstance(error, (NanochatError, OSError)):
        return StopSignal(_received)
    return None


class StopRequest:
    """While entered, a stop signal is a wish that the loop reads; a second Ctrl-C acts as it always did.

    Only that one: a second SIGTERM must not kill a rank that is writing its checkpoint. Whoever means it has SIGKILL.

    A checkpoint cannot be written inside a signal handler: the step under way holds half-updated weights, and the other
    ranks may not have been told. So the handler only notes the wish. Where all that was trained is on disk, in the
    first step, which may compile for minutes, and in an evaluation after a checkpoint, the command ends at once.

    Attributes:
        signal_name: the first signal that came, if one did.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._defers = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        global _request
        _request = self
        for number in STOP_SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _request
        _request = None
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def defers(self) -> bool:
        """Whether a stop waits for the end of the step. Without `stops_at_once` around it, it always does."""
        return self._defers or self._before.get(signal.SIGTERM) is not _raise_stop

    @defers.setter
    def defers(self, value: bool) -> None:
        self._defers = value
        if self.signal_name is not None and not self.defers:
            raise _end_of(self.signal_name)

    def _note(self, number: int, frame: FrameType | None) -> None:
        global _received, _raised
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.signal_name is None:
            self.signal_name = _received = signal.Signals(number).name
            if not self.defers:
                _raised = number != signal.SIGINT
                raise _end_of(self.signal_name)


def _end_of(signal_name: str) -> KeyboardInterrupt:
    return KeyboardInterrupt() if signal_name == signal.SIGINT.name else StopSignal(signal_name)


def _raise_stop(number: int, frame: FrameType | None) -> None:
    global _received, _raised
    if not _raised:
        _received, _raised = signal.Signals(number).name, True
        raise StopSignal(_received)


def _insist(reader: int) -> None:
    """End the process when a signal has had no effect. Ends itself when the other end of the pipe is closed."""
    name, deadline = "", math.inf
    while True:
        patience = max(0.0, deadline - time.monotonic())
        if select.select([reader], [], [], None if math.isinf(patience) else patience)[0]:
            numbers = os.read(reader, 1)
            if not numbers:
                os.close(reader)
                return
            if numbers[0] in SCHEDULER_SIGNALS and math.isinf(deadline):
                name, deadline = signal.Signals(numbers[0]).name, time.monotonic() + GRACE_SECONDS
        elif _request is None or not _request.defers:
            message = f"stopped by {name}"
            last_words("stopped", message)
            os.write(2, f"nanochat: {message}; the same command carries on\n".encode())
            os._exit(ExitCode.REQUEUE)
        else:
            deadline = math.inf


def _forget_in_child() -> None:
    """A forked child is not this command: a signal ends it, and is not reported to its parent."""
    if signal.getsignal(signal.SIGTERM) is _raise_stop or _request is not None:
        signal.set_wakeup_fd(-1)
        for number in SCHEDULER_SIGNALS:
            signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=_forget_in_child)

"""Turning a signal into a flag that the loop reads at a step boundary."""

import signal
from types import FrameType, TracebackType
from typing import Self

# Slurm sends SIGTERM at scancel, preemption and the time limit, and SIGUSR1 ahead of the limit where the job asked
# for it (--signal); a person at a terminal sends SIGINT.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """While entered, a stop signal sets a flag; a second Ctrl-C acts as it always did.

    Only that one: launchers pass SIGTERM on to processes that the scheduler has signalled already, and the second
    one must not kill a rank that is writing its checkpoint. Whoever means it has SIGKILL.

    A checkpoint cannot be written inside a signal handler: the step under way holds half-updated weights, and the other
    ranks may not have been told. So the handler only notes the wish.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal() returned, given back.

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name is None:
            self.signal_name = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

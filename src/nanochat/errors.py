"""What a person sees when something is wrong: one line with what, where, and the command that mends it."""

from enum import IntEnum


class ExitCode(IntEnum):
    """How a command ends, so that a batch script can decide what to do next.

    75 is BSD's EX_TEMPFAIL (sysexits.h): try the same command again later.
    """

    DONE = 0
    FAILED = 1
    USAGE = 2
    PREFLIGHT = 3
    DATA_DAMAGED = 4
    REQUEUE = 75
    STALLED = 76


class NanochatError(Exception):
    """An error whose message is meant for the person at the terminal, shown without a traceback.

    Args:
        what: what is wrong and where, in one line.
        fix: the command or change that mends it.
    """

    exit_code = ExitCode.FAILED

    def __init__(self, what: str, fix: str | None = None) -> None:
        self.what = what
        self.fix = fix
        super().__init__(what if fix is None else f"{what} — {fix}")


class UsageError(NanochatError):
    """The command was asked for something that cannot be done as asked."""

    exit_code = ExitCode.USAGE


class PreflightError(NanochatError):
    """What a run needs of its machine or its surroundings is not there; found before anything was computed."""

    exit_code = ExitCode.PREFLIGHT


class DataError(NanochatError):
    """Data on disk is missing, damaged, or not what its manifest says."""

    exit_code = ExitCode.DATA_DAMAGED


class StoppedWithMainError(NanochatError):
    """This rank ended because rank 0 failed, which tells the person why."""

    def __init__(self) -> None:
        super().__init__("rank 0 failed; see its message")


class LostRankError(NanochatError):
    """Another rank has ended or cannot be reached, so this one cannot go on; that one's message says why."""


class StoppedForRequeueError(NanochatError):
    """A command stopped on request, having kept all that it can carry on from; the same command carries on."""

    exit_code = ExitCode.REQUEUE


class StopSignal(KeyboardInterrupt):
    """A signal asked the command to end now.

    Like Ctrl-C it is no `Exception`: what handles errors must not take it for one and go on.

    Args:
        signal_name: for example SIGTERM.
    """

    def __init__(self, signal_name: str) -> None:
        self.signal_name = signal_name
        super().__init__(signal_name)

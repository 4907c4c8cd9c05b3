"""The `nanochat` command: find the verb, read its flags, turn errors into one line and an exit code.

Only the chosen verb's code is imported, and torch only by verbs that compute, so that help answers at once even
on a slow login node.
"""

import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence

from nanochat.commands import COMMANDS
from nanochat.errors import ExitCode, LostRankError, NanochatError, StoppedWithMainError, StopSignal
from nanochat.training.stopping import lost_stop, received, stops_at_once

# Rank 0 has nothing left to do but to write its message.
SECONDS_FOR_MAIN = 2.0

SUMMARY = "From raw text to a chat model you trained yourself."


def help_text() -> str:
    """Every command with the first line of its docstring."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{(run.__doc__ or '').splitlines()[0]}" for name, run in COMMANDS.items()]
    return "\n".join(
        [
            "usage: nanochat COMMAND [flags]",
            "",
            SUMMARY,
            "",
            *lines,
            "",
            "nanochat COMMAND --help shows the flags of a command. --debug shows the traceback of an error.",
            f"Files are kept under NANOCHAT_BASE_DIR (now {_base_dir()}).",
        ]
    )


def _base_dir() -> str:
    return os.environ.get("NANOCHAT_BASE_DIR") or "~/.cache/nanochat"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit with its code (see `ExitCode`)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["--"]:
        # torchrun takes some of our flags for its own unless `--` stands before the command, and hands the `--` on.
        arguments = arguments[1:]
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        with stops_at_once(last=True):
            code = _run(arguments)
    except StopSignal as stop:
        code = _stopped(stop.signal_name)
    except NanochatError as error:
        if debug:
            traceback.print_exc()
        # The signal that ended another rank has usually come here too.
        signal_name = received() if isinstance(error, LostRankError) else None
        if signal_name:
            code = _stopped(signal_name)
        else:
            print(f"nanochat: {error}", file=sys.stderr, flush=True)
            code = error.exit_code
        if isinstance(error, StoppedWithMainError):
            # A launcher ends all ranks as soon as one has ended, and rank 0 is still saying why it failed.
            time.sleep(SECONDS_FOR_MAIN)
    except KeyboardInterrupt:
        print("nanochat: interrupted; the same command carries on", file=sys.stderr, flush=True)
        code = 128 + 2
    except BrokenPipeError:
        # The reader of our output went away (`nanochat … | head`): no news, but not done either, if it was training. So
        # the code is that of any program that dies of SIGPIPE. Python must not flush again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except OSError as error:
        if debug:
            traceback.print_exc()
        print(f"nanochat: {error} — make room or set NANOCHAT_BASE_DIR to a place you may write to", file=sys.stderr)
        code = ExitCode.FAILED
    except Exception as error:
        if debug:
            traceback.print_exc()
        if lost := lost_stop(error):
            code = _stopped(lost.signal_name)
        else:
            print(
                f"nanochat: unexpected {type(error).__name__}: {error} — "
                f"add --debug for the traceback, and please report it",
                file=sys.stderr,
                flush=True,
            )
            code = ExitCode.FAILED
    sys.exit(code)


def _stopped(signal_name: str) -> ExitCode:
    print(f"nanochat: stopped by {signal_name}; the same command carries on", file=sys.stderr, flush=True)
    return ExitCode.REQUEUE


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(help_text())
        return ExitCode.DONE
    if arguments[0] in ("-V", "--version"):
        from nanochat.identity import version_line

        print(version_line())
        return ExitCode.DONE
    # The longest name that matches: `train base` before a possible `train`.
    for length in (2, 1):
        name = " ".join(arguments[:length])
        if name in COMMANDS:
            import tyro

            tyro.cli(COMMANDS[name], prog=f"nanochat {name}", args=arguments[length:])
            return ExitCode.DONE
    return _unknown(arguments)


def _unknown(arguments: list[str]) -> int:
    """Say what was probably meant."""
    from difflib import get_close_matches

    asked = " ".join(argument for argument in arguments[:2] if not argument.startswith("-"))
    group = [name for name in COMMANDS if name.startswith(f"{arguments[0]} ")]
    if group and len(arguments) == 1:
        print("\n".join(["usage: nanochat COMMAND [flags]", "", *(f"  nanochat {name}" for name in group)]))
        return ExitCode.USAGE
    close = get_close_matches(asked, COMMANDS, n=1) or group[:1]
    hint = f"did you mean: nanochat {close[0]}" if close else "see: nanochat --help"
    print(f"nanochat: no command {asked!r} — {hint}", file=sys.stderr)
    return ExitCode.USAGE

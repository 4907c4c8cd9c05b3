"""What a person sees while a run works: stage headers, lines of key=value, and progress.

On a terminal progress is a live bar. In a log file, and under Slurm, where a bar would be thousands of
half-lines, it is a plain line now and then.
"""

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

# A line every 30 s is under 3,000 lines for a day's job; a line at each tenth lets short work be followed
# too, but no more often than once a second.
PLAIN_SECONDS = 30.0
PLAIN_PARTS = 10
PLAIN_SECONDS_AT_LEAST = 1.0


# What was printed while no run recorded it, oldest first. More than this many lines say little about how a run began.
_unrecorded: deque[str] = deque(maxlen=10_000)
_recording = False


def record_lines() -> list[str]:
    """From now on a run records what is printed. Returns the lines printed since the last one did."""
    global _recording
    _recording = True
    lines = list(_unrecorded)
    _unrecorded.clear()
    return lines


def stop_recording_lines() -> None:
    """From now on lines are kept, for the next run to begin with."""
    global _recording
    _recording = False


def _scaled(value: float, units: tuple[str, ...], base: int) -> str:
    """Three significant digits of `value` in the unit that leaves at least one before the point."""
    index = 0
    # 999.5 would round to 1000: it belongs to the next unit already.
    while abs(value) >= (999.5 if base == 1000 else base - 0.5) and index < len(units) - 1:
        value /= base
        index += 1
    digits = 0 if index == 0 else 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f} {units[index]}".rstrip()


def format_count(count: int) -> str:
    """A count of tokens, parameters or rows: `12_345_678` is `12.3 M`."""
    return _scaled(float(count), ("", "k", "M", "B", "T"), 1000)


def format_bytes(count: int) -> str:
    """A size in binary units: `1_610_612_736` is `1.50 GiB`."""
    return _scaled(float(count), ("B", "KiB", "MiB", "GiB", "TiB", "PiB"), 1024)


def format_seconds(seconds: float) -> str:
    """A duration: `0.25 s`, `12.3 s`, `1 min 05 s`, `2 h 03 min`, `4 d 07 h`."""
    if seconds < 9.995:
        return f"{seconds:.2f} s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86_400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86_400} d {whole % 86_400 // 3600:02d} h"


def format_fields(fields: dict[str, Any]) -> str:
    """`key=value` pairs in the order given, floats to four significant digits."""
    return " ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in fields.items()
    )


class Progress:
    """Work under way. Made by `Console.progress`."""

    def __init__(self, total: int, show: Callable[[int, dict[str, Any]], None]) -> None:
        self.total = total
        self.done = 0
        self.fields: dict[str, Any] = {}
        self._show = show

    def advance(self, count: int = 1, **fields: Any) -> None:
        """Say that `count` more of the total are done; `fields` replace the ones shown."""
        self.done += count
        self.fields.update(fields)
        self._show(self.done, self.fields)


class Console:
    """Prints for a person, at once, one line per fact.

    Args:
        enabled: False makes every method do nothing; pass `rank == 0`.
        stream: where to print, by default what `sys.stdout` is at each call.
        errors: where warnings go, by default what `sys.stderr` is at each call.
        clock: seconds that only go forward.
    """

    def __init__(
        self,
        enabled: bool = True,
        *,
        stream: TextIO | None = None,
        errors: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.enabled = enabled
        self._stream = stream
        self._errors = errors
        self._clock = clock

    @property
    def interactive(self) -> bool:
        """Whether a live bar makes sense: a capable terminal, and not a Slurm job's log."""
        return self._out.isatty() and os.environ.get("TERM") != "dumb" and "SLURM_JOB_ID" not in os.environ

    @contextmanager
    def stage(self, index: int, total: int, name: str) -> Iterator[None]:
        """Print `[2/5] tokenizer …`, and how long it took or that it failed when the block ends."""
        start = self._clock()
        self._print(f"[{index}/{total}] {name} …", self._out)
        ended = "stopped"
        try:
            yield
            ended = "done"
        finally:
            self._print(f"[{index}/{total}] {name} {ended} after {format_seconds(self._clock() - start)}", self._out)

    def info(self, text: str, **fields: Any) -> None:
        """Print a line: the text, then `key=value` for each field."""
        self._print(f"{text} {format_fields(fields)}".strip(), self._out)

    def warning(self, text: str) -> None:
        """Print a warning on stderr."""
        self._print(f"warning: {text}", self._errors or sys.stderr)

    @contextmanager
    def progress(self, description: str, total: int) -> Iterator[Progress]:
        """Show how far `total` units of work are while the block runs."""
        if not self.enabled:
            yield Progress(total, lambda done, fields: None)
        elif self.interactive:
            with self._bar(description, total) as progress:
                yield progress
        else:
            with self._plain_lines(description, total) as progress:
                yield progress

    @property
    def _out(self) -> TextIO:
        return self._stream or sys.stdout

    def _print(self, text: str, stream: TextIO) -> None:
        if not self.enabled:
            return
        if not _recording:
            _unrecorded.append(text)
        # A stream that cannot write "×" must not end a run.
        encoding = stream.encoding or "utf-8"
        try:
            stream.write(text.encode(encoding, "replace").decode(encoding) + "\n")
            stream.flush()
        except OSError:
            # The log's disk is full, or the reader of a pipe has gone. Training is worth more than its lines.
            # What Python still holds for the stream goes nowhere, or its last flush would fail the process.
            self.enabled = False
            with suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)

    @contextmanager
    def _plain_lines(self, description: str, total: int) -> Iterator[Progress]:
        start = self._clock()
        printed_at, printed_part, printed_done = start, 0, -1

        def line(done: int, fields: dict[str, Any]) -> None:
            nonlocal printed_at, printed_part, printed_done
            printed_at, printed_part, printed_done = self._clock(), part(done), done
            share = f"{100 * done // total} % " if total > 0 else ""
            taken = format_seconds(printed_at - start)
            self._print(f"{description}: {share}{done}/{total} {taken} {format_fields(fields)}".rstrip(), self._out)

        def part(done: int) -> int:
            return PLAIN_PARTS * done // total if total > 0 else 0

        def show(done: int, fields: dict[str, Any]) -> None:
            waited = self._clock() - printed_at
            if waited >= PLAIN_SECONDS or (waited >= PLAIN_SECONDS_AT_LEAST and part(done) > printed_part):
                line(done, fields)

        progress = Progress(total, show)
        try:
            yield progress
        finally:
            # Also after an error: how far it came is what one wants to know then.
            if printed_done != progress.done:
                line(progress.done, progress.fields)

    @contextmanager
    def _bar(self, description: str, total: int) -> Iterator[Progress]:
        from rich.console import Console as RichConsole
        from rich.markup import escape
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[shown]}", markup=False),
        )
        with RichProgress(*columns, console=RichConsole(file=self._out, highlight=False)) as bar:
            task = bar.add_task(escape(description), total=total, shown="")
            yield Progress(total, lambda done, fields: bar.update(task, completed=done, shown=format_fields(fields)))

"""The ground truth of a stage: one JSON object per step in `metrics.jsonl`, readable without any tool."""

import json
import math
import os
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from nanochat.errors import DataError
from nanochat.files import write_text

Value = float | int | str

# JSON has no NaN or infinity, and a diverged loss is exactly what must be readable later. protobuf's JSON
# mapping (protobuf.dev/programming-guides/json) writes these three strings, so other readers know them too.
NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def to_json_value(value: Any) -> Any:
    """Return `value` with every non-finite float, at any depth, as one of `NON_FINITE`'s strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: to_json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json_value(item) for item in value]
    return value


def _from_json_value(value: Any) -> Any:
    return NON_FINITE.get(value, value) if isinstance(value, str) else value


class MetricsLog:
    """An append-only `metrics.jsonl`.

    Each row is one `write` to a file opened with O_APPEND, so it is in the kernel's hands, whole, before
    `log` returns: killing the process afterwards loses nothing. Power loss can take the latest rows; `sync`,
    called with every checkpoint, bounds that to rows a resumed run writes again anyway.

    Args:
        path: the file; made with its folder if missing. A torn last line is dropped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = self._open()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        """Append one row. A step may have several rows (a training and an evaluation row, say).

        Raises:
            ValueError: `values` has a key `step`, which would hide the row's own.
            OSError: the file cannot be written (disk full, quota). It then ends with the previous row.
        """
        if "step" in values:
            raise ValueError("'step' is the row's own key; pass it as the first argument")
        row = json.dumps({"step": step, **to_json_value(values)}, allow_nan=False)
        line = row.encode() + b"\n"
        written = 0
        try:
            while written < len(line):
                written += os.write(self._descriptor, line[written:])
        except OSError:
            if written:
                os.ftruncate(self._descriptor, os.fstat(self._descriptor).st_size - written)
            raise

    def resume(self, step: int) -> None:
        """Drop the rows after `step`, so that a run resumed from that checkpoint has each step once.

        Raises:
            DataError: a row other than a torn last one is damaged.
        """
        rows = _lines(self.path)
        kept = [line for line, row in rows if row["step"] <= step]
        if len(kept) == len(rows):
            return
        os.close(self._descriptor)
        try:
            write_text(self.path, "".join(line + "\n" for line in kept))
        finally:
            self._descriptor = self._open()

    def sync(self) -> None:
        """Flush the rows to disk, so that they survive a power loss."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Flush and close. The log cannot be written after it."""
        self.sync()
        os.close(self._descriptor)

    def _open(self) -> int:
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        # Without this, the first new row would be glued to what a dying node left of the last one.
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole != len(content):
            os.ftruncate(descriptor, whole)
        return descriptor


def _lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Every whole line of a log with the row it holds."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path} is missing", "run the stage that writes it") from None
    found = []
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            text = line.decode()
            row = json.loads(text)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise DataError(
                f"{path} line {number} is damaged",
                f"delete that line: sed -i {number}d {shlex.quote(str(path))}",
            )
        found.append((text, row))
    return found


def read(path: Path) -> list[dict[str, Any]]:
    """Read a log's rows, oldest first. Each has `step`; a torn last line, still being written, is left out.

    Raises:
        DataError: the file is missing, or a whole line is not a row.
    """
    return [{key: _from_json_value(value) for key, value in row.items()} for _, row in _lines(path)]


def series(rows: Iterable[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """The steps at which `key` was logged, and its values: what a plot needs."""
    points = [(row["step"], row[key]) for row in rows if key in row]
    return [step for step, _ in points], [value for _, value in points]

"""TensorBoard event files, for those who look at runs with it: an option, as it is a dependency of its own."""

import importlib.util
import shutil
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from nanochat.errors import UsageError
from nanochat.tracking.metrics import Value, read


def check_tensorboard() -> None:
    """Check that event files can be written.

    Raises:
        UsageError: tensorboard is not installed.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise UsageError("--tensorboard needs the package tensorboard", "pip install 'nanochat-hpc[tensorboard]'")


class EventFiles:
    """The numbers of one stage as event files: those already in its `metrics.jsonl`, and then what is logged.

    TensorBoard cannot take a step back, so the files are written afresh from the ground truth at every start.

    Args:
        folder: the files' folder, whose content is replaced.
        metrics: the stage's `metrics.jsonl`.
        step: the step to carry on from; -1 at a fresh start. Later rows will be made again.
    """

    def __init__(self, folder: Path, metrics: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        shutil.rmtree(folder, ignore_errors=True)
        self._writer: Any = SummaryWriter(str(folder), flush_secs=10)
        for row in read(metrics):
            if row["step"] <= step:
                self.log(row["step"], row)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):
            if self._writer is not None:
                self._writer.close()

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        """Log one step's numbers. The first failure is reported, and nothing is written after it."""
        try:
            for key, value in values.items():
                if self._writer is not None and key != "step" and not isinstance(value, str):
                    self._writer.add_scalar(key, value, step)
        except OSError as error:
            self._writer = None
            print(f"warning: TensorBoard's files end here ({error})", file=sys.stderr, flush=True)

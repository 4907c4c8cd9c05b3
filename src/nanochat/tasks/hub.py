"""Data sets of the Hugging Face Hub, read from `task_data/`, where `nanochat stage` puts them; never from the network.

`task_data/OWNER--NAME/` holds a repository's files as the hub has them. Rows stay in files that the `datasets` library
maps into memory, so a task with half a million conversations opens at once and costs a process next to nothing.
"""

import glob
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from nanochat.errors import DataError
from nanochat.files import MANIFEST_NAME, read_json
from nanochat.tasks.task import Problem, Split

# Arrow files that `datasets` makes of the parquet files; safe to delete.
CACHE_NAME = ".cache"


@dataclass(frozen=True)
class HubDataset:
    """Where a task finds its rows.

    Attributes:
        task: the name of the task, by which it is staged.
        repository: on the hub, `OWNER/NAME`.
        patterns: for each split, file patterns in the repository, of which the first that matches is the one. There is
            more than one where the repository was rearranged.
        columns: what every row must have.
    """

    task: str
    repository: str
    patterns: Mapping[Split, Sequence[str]]
    columns: Sequence[str]

    def folder(self, task_data: Path) -> Path:
        """The staged copy of the repository."""
        return task_data / self.repository.replace("/", "--")

    def files(self, task_data: Path, split: Split) -> list[Path]:
        """The staged files of a split, in order.

        Raises:
            DataError: there are none.
        """
        folder = self.folder(task_data)
        for pattern in self.patterns[split]:
            if found := sorted(folder.glob(pattern)):
                return found
        raise DataError(
            f"{folder / self.patterns[split][0]} is not there", f"stage it where there is network: {self.stage_command}"
        )

    @property
    def stage_command(self) -> str:
        """What puts the data set there."""
        return f"nanochat stage {self.task}"

    def describe_files(self, task_data: Path) -> list[list[Any]]:
        """What decides the rows, without reading them: each file's name, bytes and checksum, or its time without one.

        Raises:
            DataError: a split has no files.
        """
        folder = self.folder(task_data)
        manifest = read_json(folder / MANIFEST_NAME) if (folder / MANIFEST_NAME).is_file() else {"files": []}
        checksums = {(entry["name"], entry["bytes"]): entry["sha256"] for entry in manifest["files"]}
        described = []
        for path in dict.fromkeys([*self.files(task_data, "train"), *self.files(task_data, "test")]):
            name, status = path.relative_to(folder).as_posix(), path.stat()
            described.append([name, status.st_size, checksums.get((name, status.st_size), status.st_mtime_ns)])
        return described

    def problems(
        self,
        task_data: Path,
        split: Split,
        convert: Callable[[Any], Problem],
        *,
        keep: Callable[[Any], bool] | None = None,
    ) -> Sequence[Problem]:
        """The problems of a split, made from its rows as they are asked for.

        Args:
            convert: makes a problem of a row; a ValueError, TypeError, KeyError or IndexError says that it is none.
            keep: which rows to use; default: all.

        Raises:
            DataError: the files are missing, damaged or without the columns.
        """
        rows = self._rows(task_data, self.files(task_data, split))
        return _Problems(rows.filter(keep) if keep else rows, convert, f"{self.folder(task_data)} ({split})")

    def _rows(self, task_data: Path, files: Sequence[Path]) -> Any:
        import datasets

        cache = task_data / CACHE_NAME
        datasets.disable_progress_bars()
        try:
            # Not `load_dataset`, which reports each use of a data set to the hub and waits where nothing answers.
            rows = datasets.Dataset.from_parquet([glob.escape(str(path)) for path in files], cache_dir=str(cache))
        except (datasets.exceptions.DatasetGenerationError, OSError, ValueError) as error:
            cause = error.__cause__ or error
            reason = str(cause).split("\n")[0]
            # Only the operating system's errors have a number; Arrow uses the same class for damaged files.
            if isinstance(cause, OSError) and cause.errno:
                raise DataError(f"{files[0].parent} cannot be read ({reason})", f"{cache} needs room too") from None
            raise DataError(
                f"{files[0].parent} is damaged ({reason})",
                f"delete {self.folder(task_data)} and run: {self.stage_command}",
            ) from None
        if "train" in rows.column_names and "train" not in self.columns:
            # One revision of cais/mmlu wraps every row of its training split in a column of this name.
            rows = rows.flatten()
            rows = rows.rename_columns({name: name.removeprefix("train.") for name in rows.column_names})
        _check_columns(files[0], rows.column_names, self.columns)
        return rows


class _Problems(Sequence[Problem]):
    """Rows seen as problems."""

    def __init__(self, rows: Sequence[Any], convert: Callable[[Any], Problem], where: str) -> None:
        self._rows = rows
        self._convert = convert
        self._where = where

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Problem: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Problem]: ...
    def __getitem__(self, index: int | slice) -> Problem | Sequence[Problem]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        row = self._rows[range(len(self))[index]]
        try:
            return self._convert(row)
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise DataError(f"{self._where} row {index + 1} is not a problem of this task: {error}") from None


def _check_columns(file: Path, found: Iterable[str], expected: Iterable[str]) -> None:
    for column in expected:
        if column not in found:
            raise DataError(
                f"{file} has no column {column!r}, only {', '.join(found)}",
                "this revision of the data set is not one that this version reads; stage another",
            )

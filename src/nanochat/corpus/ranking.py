"""The best rows of a scored corpus, or all of them from best to worst, without holding the corpus.

Only the quality columns are read at first, as numbers whose order is that of the rows. Of these the cut is found by
counting, 16 bits at a time from the top, so that no more than one file's keys are in memory; a full order takes 16
bytes of memory per row and key. Then the rows are read once more and kept or put in order as `preparation` does it.

Nulls and NaN come last, whichever way it is sorted. Rows with equal keys keep the order of their files and rows, and
where a cut falls among them the first are taken, so the number of rows is exact.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nanochat.corpus.preparation import Array, Preparation, Watch, prepare, save_array, work_folder
from nanochat.corpus.sources import SourceFile, SourceRequest, open_parquet, read_tables
from nanochat.corpus.workers import run_tasks
from nanochat.errors import UsageError
from nanochat.files import read_json, write_json

RUN_BYTES = 64 * 2**20
ROWS_AT_ONCE = 2**20
LAST = np.uint64(2**64 - 1)
SIGN = np.uint64(2**63)
DIGIT_BITS = 16


@dataclass(frozen=True)
class Ranking:
    """Rows by one or several columns, the first deciding.

    Attributes:
        folder: where keys and places are.
        by: the columns.
        descending: highest first.
        top: the share of all rows to keep, in the order of their source; None keeps all and sorts them.
    """

    folder: Path
    by: tuple[str, ...]
    descending: bool
    top: float | None

    @property
    def run_bytes(self) -> int | None:
        """A cut keeps the order of the source."""
        return RUN_BYTES if self.top is None else None

    def describe(self) -> dict[str, Any]:
        """What decides which rows, and their order."""
        return {"by": list(self.by), "descending": self.descending, "top": self.top}

    def keys(self, index: int) -> Path:
        """The keys of one source file, (K, rows): smaller is better."""
        return self.folder / f"{index:05d}.npy"

    def places(self, index: int) -> Path:
        """The places of a source file's rows among all."""
        return self.folder / f"{index:05d}.places.npy"

    @property
    def cut(self) -> Path:
        """The key of the last row to keep, and how many rows with that very key each file may keep."""
        return self.folder / "cut.json"

    def of_file(self, index: int, file: SourceFile) -> Callable[[int, int], Array]:
        """The mask, or the places, of consecutive rows of one file."""
        if self.top is None:
            chosen: Array = np.load(self.places(index), mmap_mode="r")
        else:
            cut = read_json(self.cut)
            below, equal = _compare(np.load(self.keys(index)), cut["key"])
            chosen = below | (equal & (np.cumsum(equal) <= cut["equal_rows"][index]))
        return lambda first, rows: chosen[first : first + rows]


@dataclass(frozen=True)
class _KeyTask:
    preparation: Preparation
    ranking: Ranking
    index: int


def prepare_ranking(
    folder: Path,
    request: SourceRequest,
    *,
    by: tuple[str, ...],
    descending: bool,
    top: float | None,
    columns: tuple[str, ...],
    rows_per_shard: int,
    validation_rows: int,
    seed: int,
) -> tuple[Preparation, Ranking]:
    """Plan a corpus of the best rows of a source, or of all of them in order.

    Args:
        folder: where the corpus will be.
        request: where its rows come from.
        by: columns of numbers, the first deciding.
        descending: the highest are best.
        top: share of all rows to keep, above 0 and at most 1; None sorts all.
        columns, rows_per_shard, validation_rows, seed: see `Preparation`.

    Returns:
        The plan, and the ranking for `read_keys`, without which it cannot be carried out.

    Raises:
        UsageError: the request makes no sense, or unfinished work on another corpus is in the way.
        NanochatError: the source cannot be reached.
    """
    if top is not None and not 0 < top <= 1:
        raise UsageError(f"the top {top} of the rows cannot be taken", "give --top a share above 0 and at most 1")
    if not all(by) or not by:
        raise UsageError("nothing to rank by", "name one or several columns of numbers: --by score")
    ranking = Ranking(work_folder(folder.resolve()) / "keys", by, descending, top)
    preparation = prepare(
        folder,
        request,
        lambda source: ranking,
        ranking.describe(),
        title="rank",
        columns=columns,
        rows_per_shard=rows_per_shard,
        validation_rows=validation_rows,
        seed=seed,
    )
    return preparation, ranking


def read_keys(preparation: Preparation, ranking: Ranking, workers: int | None, watch: Watch) -> tuple[int, int, int]:
    """Read the quality columns and decide which rows are kept, or their order.

    Args:
        workers: processes; by default one per usable core.
        watch: shown how far it is.

    Returns:
        How many rows there are, how many are kept, and how many of these have no score: a null or NaN in the first
        column.

    Raises:
        UsageError: a column is not there or does not hold numbers.
        DataError, NanochatError: a source file is damaged or cannot be reached.
    """
    tasks = [_KeyTask(preparation, ranking, index) for index in range(len(preparation.source.files))]
    rows = [0] * len(tasks)
    with watch("reading keys", len(tasks)) as progress:
        for task, count in run_tasks(_make_keys, tasks, workers, f"read {preparation.source.place}"):
            rows[task.index] = count
            progress.advance(rows=sum(rows))
    total = sum(rows)
    if ranking.top is None:
        _write_places(ranking, rows)
        return total, total, total - _scored(ranking, len(rows))
    kept = max(1, round(ranking.top * total))
    key, wanted = _cut(ranking, len(rows), kept)
    equal_rows = []
    for index in range(len(rows)):
        equal = int(_compare(np.load(ranking.keys(index)), key)[1].sum())
        equal_rows.append(min(equal, wanted))
        wanted -= equal_rows[-1]
    write_json(ranking.cut, {"key": key, "equal_rows": equal_rows})
    return total, kept, max(0, kept - _scored(ranking, len(rows)))


def _scored(ranking: Ranking, num_files: int) -> int:
    return sum(int((keys[0] != LAST).sum()) for keys in _in_chunks(ranking, num_files))


def _make_keys(task: _KeyTask) -> int:
    """Write the keys of one file, or find them written. Returns the number of its rows."""
    path = task.ranking.keys(task.index)
    if not path.exists():
        source, columns = task.preparation.source, task.ranking.by
        file = source.files[task.index]
        with open_parquet(source, file, columns, task.preparation.work / "downloads") as parquet:
            _check_numbers(parquet.schema_arrow, columns, f"{source.place}/{file.name}")
            tables = [_order_keys(table, task.ranking.descending) for table in read_tables(parquet, columns)]
        save_array(path, np.concatenate(tables, axis=1) if tables else np.zeros((len(columns), 0), np.uint64))
    return int(np.load(path, mmap_mode="r").shape[1])


def _check_numbers(schema: pa.Schema, columns: tuple[str, ...], where: str) -> None:
    for name in columns:
        kind = schema.field(name).type
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
            raise UsageError(f"{where}: column {name!r} holds {kind}, not numbers", "rank --by another column")


def _order_keys(table: pa.Table, descending: bool) -> Array:
    """Unsigned numbers that order the rows, (K, rows).

    Floats by their bits, which order as integers do once the negative ones are turned over. The one integer at the very
    end of 64 bits ties with the nulls.
    """
    keys = []
    for column in table.columns:
        is_last = pc.is_null(column, nan_is_null=True).to_numpy().astype(bool)
        if pa.types.is_floating(column.type):
            # Adding 0 turns the negative zero into the positive one, which it equals.
            bits = (column.cast(pa.float64()).fill_null(0).to_numpy() + 0.0).view(np.uint64)
            key = np.where(bits >= SIGN, ~bits, bits | SIGN)
        elif pa.types.is_uint64(column.type):
            key = column.fill_null(0).to_numpy()
        else:
            key = column.cast(pa.int64()).fill_null(0).to_numpy().view(np.uint64) ^ SIGN
        keys.append(np.where(is_last, LAST, ~key if descending else key))
    return np.stack(keys)


def _cut(ranking: Ranking, num_files: int, wanted: int) -> tuple[list[int], int]:
    """The key of the `wanted`-th row in order, and how many rows with that very key are among the first `wanted`."""
    key: list[int] = []
    for _ in ranking.by:
        value = 0
        for shift in range(64 - DIGIT_BITS, -1, -DIGIT_BITS):
            counts = np.zeros(2**DIGIT_BITS, np.int64)
            for keys in _in_chunks(ranking, num_files):
                column = keys[len(key)]
                # Twice, as a shift by all 64 bits is not defined.
                matches = column >> np.uint64(shift) >> np.uint64(DIGIT_BITS) == np.uint64(value)
                for known, other in zip(key, keys):
                    matches &= other == np.uint64(known)
                digits = (column[matches] >> np.uint64(shift)) & np.uint64(2**DIGIT_BITS - 1)
                counts += np.bincount(digits.astype(np.int64), minlength=len(counts))
            upto = np.cumsum(counts)
            digit = int(np.searchsorted(upto, wanted))
            wanted -= int(upto[digit] - counts[digit])
            value = value << DIGIT_BITS | digit
        key.append(value)
    return key, wanted


def _in_chunks(ranking: Ranking, num_files: int) -> Iterator[Array]:
    for index in range(num_files):
        keys = np.load(ranking.keys(index), mmap_mode="r")
        for first in range(0, keys.shape[1], ROWS_AT_ONCE):
            yield np.asarray(keys[:, first : first + ROWS_AT_ONCE])


def _compare(keys: Array, key: list[int]) -> tuple[Array, Array]:
    """Which rows come before a key, and which have it."""
    below, equal = np.zeros(keys.shape[1], bool), np.ones(keys.shape[1], bool)
    for column, value in zip(keys, key):
        below |= equal & (column < np.uint64(value))
        equal &= column == np.uint64(value)
    return below, equal


def _write_places(ranking: Ranking, rows: list[int]) -> None:
    keys = np.concatenate([np.load(ranking.keys(index)) for index in range(len(rows))], axis=1)
    # The last key given to lexsort decides first. It is stable.
    order = np.lexsort(keys[::-1])
    places = np.empty(len(order), np.int64)
    places[order] = np.arange(len(order))
    first = 0
    for index, count in enumerate(rows):
        save_array(ranking.places(index), places[first : first + count])
        first += count

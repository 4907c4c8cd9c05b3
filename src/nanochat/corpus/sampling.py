"""A seeded sample of the rows of a corpus, too large to hold and too fat to read whole."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nanochat.corpus.preparation import Preparation, prepare
from nanochat.corpus.sources import SourceFile, SourceRequest
from nanochat.errors import UsageError


@dataclass(frozen=True)
class Draw:
    """Keeps each row with the same probability, decided by the seed, the name of its file and its number in the file.

    The numbers are the raw 64-bit stream of Philox4x64-10 (Salmon et al. 2011, doi 10.1145/2063384.2063405), keyed by
    seed and name. Its raw stream is fixed by definition, unlike numpy's distributions, and unlike the hash functions
    that polars and DuckDB sample by, which changed between versions of polars. Row groups play no part: a file written
    anew with others gives the same rows. An exact number of rows would need all row counts first, and a row's choice
    would hang on files that it has nothing to do with.
    """

    ratio: float
    seed: int

    @property
    def run_bytes(self) -> None:
        """The order of the source is kept."""

    def describe(self) -> dict[str, Any]:
        """What decides the sample."""
        return {"ratio": self.ratio, "draw_seed": self.seed}

    def of_file(self, index: int, file: SourceFile) -> Callable[[int, int], np.ndarray[Any, np.dtype[np.bool_]]]:
        """The mask of consecutive rows of one file."""
        key = hashlib.sha256(f"{self.seed}\0{file.name}".encode()).digest()[:16]
        numbers = np.random.Philox(key=int.from_bytes(key, "little"))
        # Of 2**64 equally likely numbers so many are kept; the float is exact, as its denominator is a power of two.
        threshold = int(self.ratio * 2**64)

        def choose(first: int, rows: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
            return numbers.random_raw(rows) < np.uint64(threshold) if threshold < 2**64 else np.ones(rows, bool)

        return choose


def prepare_subset(
    folder: Path,
    request: SourceRequest,
    *,
    ratio: float,
    seed: int,
    columns: tuple[str, ...],
    rows_per_shard: int,
    validation_rows: int,
) -> Preparation:
    """Plan a corpus of a random share of the rows of a source.

    Args:
        folder: where the corpus will be.
        request: where its rows come from.
        ratio: of the rows to keep, above 0 and at most 1.
        seed: chooses the rows, and the validation set among them.
        columns, rows_per_shard, validation_rows: see `Preparation`.

    Raises:
        UsageError: the request makes no sense, or unfinished work on another corpus is in the way.
        NanochatError: the source cannot be reached.
    """
    if not 0 < ratio <= 1:
        raise UsageError(f"a share of {ratio} of the rows cannot be taken", "give a --ratio above 0 and at most 1")
    choice = Draw(ratio, seed)
    return prepare(
        folder,
        request,
        lambda source: choice,
        choice.describe(),
        title="subset",
        columns=columns,
        rows_per_shard=rows_per_shard,
        validation_rows=validation_rows,
        seed=seed,
    )

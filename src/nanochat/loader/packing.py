"""Best-fit packing: full rows, every row begins with BOS, and (by default) not one token thrown away.

A row holds T + 1 tokens, T inputs and the same shifted by one as targets. It begins with the oldest pending
document, so no document waits for ever; then, again and again, the longest pending document that fits the
space left is added. When none fits, the shortest is split there, because that leaves the smallest tail, and
the tail goes back into the pool as a piece of its own that begins with BOS. The alternative, cropping the
tail (karpathy/nanochat's choice, about 35 % of tokens at T = 2048 by its own docstring), is kept as
`remainders="drop"`. Conversations are not split, as half an answer teaches little: with `remainders="pad"` a
row ends where no whole document fits any more, and a document longer than a row is cropped to one, so that it
can never clog the pool.

What is packed here are *plans*, not tokens: rows are lists of pieces, and copying tokens comes later. So a
lane's whole state is a few hundred small integers. A piece that starts within a document takes one more token in the
row than it has, a BOS put in front of it.
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from nanochat.loader.order import DocumentOrder
from nanochat.loader.token_shards import Piece

Remainders = Literal["keep", "drop", "pad"]

# What is left of a document, from `start` on: (document, start, tokens it takes in a row).
Pending = tuple[int, int, int]

# Pending pieces are sorted by `(size << NUMBER_BITS) - number`, an integer, as tuples take twice as long to compare.
# A lane numbers its pieces from 0 on; no run delivers as many as this.
NUMBER_BITS = 48
NUMBER_MASK = 2**NUMBER_BITS - 1


@dataclass(frozen=True)
class LaneCounts:
    """What a lane has delivered since the run began.

    Attributes:
        rows: rows of T + 1 tokens.
        documents: documents whose first token was delivered.
        added_bos: BOS tokens put before the tails of split documents.
        cropped: tokens thrown away (always 0 when remainders are kept).
        padded: places left empty (always 0 unless rows are padded).
    """

    rows: int = 0
    documents: int = 0
    added_bos: int = 0
    cropped: int = 0
    padded: int = 0


@dataclass(frozen=True)
class LaneState:
    """Where a lane stands between two rows: all that is needed to make its next row.

    Attributes:
        epoch: the epoch its pending documents belong to.
        position: how many documents of its share of that epoch it has taken.
        pending: what it has taken but not yet delivered, oldest first.
        counts: what it has delivered.
    """

    epoch: int = 0
    position: int = 0
    pending: tuple[Pending, ...] = ()
    counts: LaneCounts = LaneCounts()

    def to_json(self) -> dict[str, Any]:
        """The state as JSON-able data."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "pending": [list(piece) for piece in self.pending],
            "counts": asdict(self.counts),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "LaneState":
        """The inverse of `to_json`, also after a trip through JSON text.

        Raises:
            KeyError, TypeError, ValueError: `value` is not a lane's state.
        """
        pending = tuple((int(document), int(start), int(size)) for document, start, size in value["pending"])
        return cls(int(value["epoch"]), int(value["position"]), pending, LaneCounts(**value["counts"]))


class Lane:
    """One endless, reproducible stream of row plans.

    An epoch ends when all its documents have been delivered: the pool runs empty before the next epoch's
    first document enters. So "once per epoch" holds for what is trained on, not only for what is read, and in
    a corpus smaller than the pool a document is never packed beside its own copy.

    Args:
        order: which documents, in which order.
        lengths_of: maps an array of documents to their lengths in tokens, BOS included, all at least 1.
        row_size: T + 1.
        pool_size: how many pieces may be pending; more fit better and disturb the order further.
        remainders: what becomes of the tail of a document that was split to complete a row; `pad` splits none.
        state: where to go on; by default at the beginning of epoch 0.
    """

    def __init__(
        self,
        order: DocumentOrder,
        lengths_of: Callable[[NDArray[np.int64]], NDArray[np.int64]],
        *,
        row_size: int,
        pool_size: int,
        remainders: Remainders = "keep",
        state: LaneState | None = None,
    ) -> None:
        state = state or LaneState()
        self._order = order
        self._lengths_of = lengths_of
        self._row_size = row_size
        self._pool_size = pool_size
        self._remainders = remainders
        self._epoch = state.epoch
        self._position = state.position
        self._counts = asdict(state.counts)
        self._drawn: Iterator[tuple[int, int]] = iter(())
        self._epoch_is_drawn = False
        # Pending pieces by number, the oldest first, and their keys: of equal sizes the oldest comes last.
        self._pool: dict[int, Pending] = {}
        self._keys: list[int] = []
        self._next_number = 0
        for piece in state.pending:
            self._add(piece)

    def state(self) -> LaneState:
        """Where the lane stands now; later rows do not change what was returned."""
        counts = LaneCounts(**self._counts)
        return LaneState(self._epoch, self._position, tuple(self._pool.values()), counts)

    def next_row(self) -> list[Piece]:
        """Plan the next row: pieces that, with their added BOS, are `row_size` tokens long, or less if padded."""
        self._refill()
        oldest, (_, _, size) = next(iter(self._pool.items()))
        row: list[Piece] = []
        space = self._place(bisect_left(self._keys, (size << NUMBER_BITS) - oldest), self._row_size, row)
        while space:
            self._refill()
            # The largest key of this size that there can be, as no number is negative.
            largest_that_fits = bisect_right(self._keys, space << NUMBER_BITS) - 1
            if largest_that_fits < 0 and self._remainders == "pad":
                self._counts["padded"] += space
                break
            space = self._place(max(largest_that_fits, 0), space, row)
        self._counts["rows"] += 1
        return row

    def _refill(self) -> None:
        while len(self._pool) < self._pool_size:
            for document, length in self._drawn:
                self._position += 1
                self._add((document, 0, length))
                if len(self._pool) == self._pool_size:
                    return
            if not self._epoch_is_drawn:
                documents = self._order.block(self._epoch, self._position)
                self._drawn = zip(documents.tolist(), self._lengths_of(documents).tolist())
                self._epoch_is_drawn = len(documents) == 0
            elif self._pool:
                return
            else:
                self._epoch += 1
                self._position = 0
                self._epoch_is_drawn = False

    def _add(self, piece: Pending) -> None:
        number = self._next_number
        self._next_number = number + 1
        self._pool[number] = piece
        insort(self._keys, (piece[2] << NUMBER_BITS) - number)

    def _place(self, index: int, space: int, row: list[Piece]) -> int:
        """Move a pending piece, or as much of it as fits, into the row. Returns the space that is left."""
        document, start, size = self._pool.pop(-self._keys.pop(index) & NUMBER_MASK)
        if start == 0:
            self._counts["documents"] += 1
            first = 0
        else:
            self._counts["added_bos"] += 1
            first = 1
        if size <= space:
            row.append((document, start, start + size - first))
            return space - size
        stop = start + space - first
        row.append((document, start, stop))
        if self._remainders == "keep":
            self._add((document, stop, size - space + 1))
        else:
            self._counts["cropped"] += size - space
        return 0

"""The order of documents: a property of (seed, epoch), never of the machine.

A shuffled list of 10^8 documents would cost every rank gigabytes and seconds per epoch. A permutation that
can be *computed* at any position costs nothing, and resuming in the middle of an epoch is a matter of one
integer.
"""

import hashlib
from dataclasses import dataclass
from math import isqrt
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

# Four rounds on each half. Two would be a bijection as well, but a visibly regular one.
NUM_ROUNDS = 8

# The finaliser of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014; constants by D. Stafford, variant 13).
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
MIX_2 = np.uint64(0x94D049BB133111EB)

# Long enough that numpy's cost per call is shared by many documents, short enough to be nothing to recompute.
BLOCK_SIZE = 1024


def _hash32(values: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    """Hash each value with a round key to 32 well mixed bits."""
    mixed = values * GOLDEN + key
    mixed = (mixed ^ (mixed >> np.uint64(30))) * MIX_1
    mixed = (mixed ^ (mixed >> np.uint64(27))) * MIX_2
    return mixed >> np.uint64(32)


class Permutation:
    """A pseudo-random permutation of [0, size) that is computed position by position, never stored.

    A Feistel network whose halves are residues modulo `rows` and `columns` instead of bits ("generalised
    Feistel", Black & Rogaway, CT-RSA 2002), so that its domain `rows × columns` exceeds `size` by at most
    about √size. Positions that land beyond `size` are sent through again until they do not (cycle walking),
    which keeps the map a bijection. The keys come from a cryptographic hash, so neighbouring seeds and epochs
    are unrelated.

    Args:
        size: how many positions there are, 1 to 2^62.
        seed: the run's seed.
        epoch: every epoch has its own order.
    """

    def __init__(self, size: int, seed: int, epoch: int) -> None:
        rows = isqrt(size - 1) + 1
        self._size = np.uint64(size)
        self._rows = np.uint64(rows)
        self._columns = np.uint64(-(-size // rows))
        digest = hashlib.sha512(f"document order/{seed}/{epoch}".encode()).digest()
        self._keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)[:NUM_ROUNDS]

    def __call__(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The items at `positions`; both are int64 arrays of the same shape with values in [0, size)."""
        items = self._encrypt(positions.astype(np.uint64))
        while (outside := items >= self._size).any():
            items[outside] = self._encrypt(items[outside])
        return items.astype(np.int64)

    def _encrypt(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = values // self._columns, values % self._columns
        for key_left, key_right in zip(self._keys[0::2], self._keys[1::2]):
            # 32-bit hashes and halves below 2^32: the sums cannot wrap around, which would break the
            # bijection.
            left = (left + _hash32(right, key_left)) % self._rows
            right = (right + _hash32(left, key_right)) % self._columns
        return left * self._columns + right


class DocumentOrder(Protocol):
    """Which documents one lane takes, epoch by epoch."""

    def block(self, epoch: int, position: int) -> NDArray[np.int64]:
        """The next documents from `position` of the lane's share of `epoch`; empty when the epoch is over."""


@dataclass(frozen=True)
class ShuffledOrder:
    """Lane `lane` of `num_lanes` takes the positions lane, lane + num_lanes, … of each epoch's permutation.

    So over all lanes every document occurs exactly once per epoch, whoever serves the lanes.
    """

    num_documents: int
    seed: int
    lane: int
    num_lanes: int

    def block(self, epoch: int, position: int) -> NDArray[np.int64]:
        """See `DocumentOrder.block`."""
        share = range(self.lane, self.num_documents, self.num_lanes)[position : position + BLOCK_SIZE]
        if not share:
            return np.empty(0, dtype=np.int64)
        positions = np.arange(share.start, share.stop, share.step, dtype=np.int64)
        return Permutation(self.num_documents, self.seed, epoch)(positions)


@dataclass(frozen=True)
class NaturalOrder:
    """All documents as they stand on disk: what a fixed validation set is made from."""

    num_documents: int

    def block(self, epoch: int, position: int) -> NDArray[np.int64]:
        """See `DocumentOrder.block`; every epoch is the same."""
        return np.arange(position, min(position + BLOCK_SIZE, self.num_documents), dtype=np.int64)

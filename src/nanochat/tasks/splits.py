"""How generated problems are parted: what a problem is about decides, so that train and test can share nothing.

A seed per split, the usual way, promises nothing: two streams of random problems meet, and equal seeds make them equal.
Here the digest of a key (the word, the expression, the object) puts it on one side for good, whatever is asked about
it and however it is phrased. Digests also stand in for every random choice, so each machine makes the same problems.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from nanochat.corpus.shards import text_digest
from nanochat.tasks.task import Split

T = TypeVar("T")

SPLIT_SEED = 0
CHOICE_SEED = 1
DIGEST_RANGE = 2**128

TEST_SHARE = 0.1
# 400 problems give an accuracy to within ±5 points; more would cost the demo time.
MAX_TEST_PROBLEMS = 400


def split_by_key(items: Iterable[T], key: Callable[[T], str], split: Split, share: float = TEST_SHARE) -> list[T]:
    """The items of one split in the order of their keys' digests, which is as good as a shuffle.

    Args:
        key: what an item is about; items of equal keys are on one side.
        share: of the items for the test, about; with two keys or more, neither side is empty.
    """
    digests = [(text_digest(key(item), SPLIT_SEED), item) for item in items]
    if not digests:
        return []
    lowest, highest = min(digest for digest, _ in digests), max(digest for digest, _ in digests)
    boundary = min(max(int(share * DIGEST_RANGE), lowest + 1), highest)
    chosen = [(digest, item) for digest, item in digests if (digest < boundary) == (split == "test")]
    return [item for _, item in sorted(chosen, key=lambda pair: pair[0])]


def pick(options: Sequence[T], *about: str) -> T:
    """One of `options`, by the digest of what it is picked for."""
    return options[text_digest("\n".join(about), CHOICE_SEED) % len(options)]


def shuffled(options: Iterable[str], *about: str) -> list[str]:
    """Texts in an order that depends on what it is for."""
    return sorted(options, key=lambda option: text_digest("\n".join((*about, option)), CHOICE_SEED))

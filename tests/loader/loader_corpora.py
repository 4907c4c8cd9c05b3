"""Small token folders with known content, and strategies that make them."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from nanochat.files import write_manifest
from nanochat.loader.token_shards import MANIFEST_KIND, Split, TokenDataset, write_shard

BOS = 999
VOCAB_SIZE = 1000

# Shards of documents, each given by its length in tokens. Shards may be empty.
# A corpus is masked when there is a seed for its masks.
Shards = list[list[int]]


@st.composite
def corpora(draw: st.DrawFn, min_documents: int, max_length: int = 60) -> Shards:
    length = st.integers(1, max_length)
    lengths = draw(st.lists(length, min_size=min_documents, max_size=min_documents + 30))
    cuts = sorted(draw(st.lists(st.integers(0, len(lengths)), max_size=3)))
    return [lengths[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(lengths)])]


def document_tokens(index: int, length: int) -> list[int]:
    """A document that can be told from every other one, and its tokens from their neighbours."""
    return [BOS, *((index * 7919 + place * 31) % BOS for place in range(length - 1))]


def document_mask(index: int, length: int, seed: int) -> list[int]:
    """Which tokens of a document are trained on: any, as likely many as few."""
    random = np.random.default_rng([seed, index])
    return (random.random(length) < random.random()).astype(int).tolist()


def write_tokens(folder: Path, shards: Shards, split: Split = "train", mask_seed: int | None = None) -> None:
    files = []
    index = 0
    for number, lengths in enumerate(shards):
        tokens = [token for i, n in enumerate(lengths) for token in document_tokens(index + i, n)]
        masks = mask_seed is not None and [document_mask(index + i, n, mask_seed) for i, n in enumerate(lengths)]
        index += len(lengths)
        files += write_shard(
            folder,
            f"{split}_{number:05d}",
            split,
            np.array(tokens, dtype=np.uint16),
            np.cumsum([0, *lengths], dtype=np.int64),
            None if masks is False else np.array([said for mask in masks for said in mask], dtype=np.uint8),
        )
    about = {"fingerprint": "a tokenizer", "vocab_size": VOCAB_SIZE, "bos_id": BOS}
    write_manifest(folder, MANIFEST_KIND, files, tokenizer=about)


@contextmanager
def dataset_of(shards: Shards, split: Split = "train", mask_seed: int | None = None) -> Iterator[TokenDataset]:
    with tempfile.TemporaryDirectory() as name:
        write_tokens(Path(name), shards, split, mask_seed)
        yield TokenDataset.open(Path(name), split)


def flat(shards: Shards) -> Sequence[int]:
    return [length for shard in shards for length in shard]

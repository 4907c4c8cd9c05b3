"""Token shards: text that was tokenised once, memory-mapped by every rank of every run.

A folder `tokens/` holds, for each shard of text,

    train_00000.tokens.npy    uint16, all documents one after another, each beginning with BOS
    train_00000.offsets.npy   int64, document i is tokens[offsets[i]:offsets[i + 1]]

and the same for `val`, and a manifest. Plain `.npy` because every tool of the field reads it. Whatever runs
parallel to the tokens (a loss mask, say) would be one more `.npy` beside them, with the same offsets.
"""

from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from nanochat.errors import DataError
from nanochat.files import MANIFEST_NAME, file_entry, fingerprint, read_manifest, verify_files, whole_file

Split = Literal["train", "val"]

MANIFEST_KIND = "tokens"
TOKENS_SUFFIX = ".tokens.npy"
OFFSETS_SUFFIX = ".offsets.npy"
TOKENIZE_COMMAND = "nanochat data tokenize"

# uint16 halves the bytes to read of every wider type and holds every vocabulary this project trains.
MAX_VOCAB_SIZE = 2**16

# Opening thousands of shards waits on the metadata server of a cluster file system, not on a core.
NUM_OPENING_THREADS = 16


def write_shard(
    folder: Path, stem: str, split: Split, tokens: NDArray[np.uint16], offsets: NDArray[np.int64]
) -> list[dict[str, Any]]:
    """Write one shard's two files atomically.

    Args:
        stem: the shard's name without suffixes, `train_00000`.
        tokens: all documents one after another, each beginning with BOS.
        offsets: `documents + 1` boundaries, from 0 to `len(tokens)`.

    Returns:
        The two files' manifest entries.
    """
    counts = {"split": split, "documents": len(offsets) - 1, "tokens": len(tokens)}
    entries = []
    for suffix, array in ((TOKENS_SUFFIX, tokens), (OFFSETS_SUFFIX, offsets)):
        path = folder / f"{stem}{suffix}"
        with whole_file(path) as temporary, temporary.open("wb") as stream:
            np.save(stream, array, allow_pickle=False)
        entries.append(file_entry(path, **counts))
    return entries


def _map_tokens(path: Path, num_tokens: int, fix: str) -> NDArray[np.uint16]:
    """Map a token file read-only, without keeping it open.

    numpy's and Python's own maps each hold a file descriptor, and a usual limit of 1,024 of them would stop a
    run of a few thousand shards. torch closes the file as soon as it is mapped.
    """
    import torch

    header = np.load(path, mmap_mode="r", allow_pickle=False)
    if header.dtype != np.uint16 or header.shape != (num_tokens,):
        found = f"{header.dtype}{list(header.shape)}"
        raise DataError(f"{path} holds {found}, expected uint16[{num_tokens}]", fix)
    skip = header.offset // header.itemsize
    whole = torch.from_file(str(path), shared=False, size=skip + num_tokens, dtype=torch.uint16)
    tokens: NDArray[np.uint16] = whole.numpy()[skip:]
    tokens.flags.writeable = False
    return tokens


def _load_offsets(path: Path, num_documents: int, num_tokens: int, fix: str) -> NDArray[np.int64]:
    offsets: NDArray[np.int64] = np.load(path, allow_pickle=False)
    if offsets.dtype != np.int64 or offsets.shape != (num_documents + 1,):
        found = f"{offsets.dtype}{list(offsets.shape)}"
        raise DataError(f"{path} holds {found}, expected int64[{num_documents + 1}]", fix)
    if offsets[0] != 0 or offsets[-1] != num_tokens or (np.diff(offsets) < 1).any():
        raise DataError(f"{path} does not cut {num_tokens} tokens into {num_documents} documents", fix)
    return offsets


@dataclass(frozen=True, eq=False)
class TokenDataset:
    """All documents of one split, numbered from 0 in the order of shards and of documents in them.

    Only 8 bytes per document are held in memory; tokens are mapped and shared by all processes of a machine.

    Attributes:
        folder: where the shards are.
        split: `train` or `val`.
        num_documents: at least 1.
        num_tokens: of all documents, BOS included.
        bos_id: the token every document begins with.
        vocab_size: of the tokenizer that made the tokens.
        fingerprint: equal exactly when tokens, document boundaries and tokenizer are.
    """

    folder: Path
    split: Split
    num_documents: int
    num_tokens: int
    bos_id: int
    vocab_size: int
    fingerprint: str
    _shards: Sequence[NDArray[np.uint16]]
    _shard_starts: Sequence[int]
    _offsets: NDArray[np.int64]

    @classmethod
    def open(cls, folder: Path, split: Split, *, fix: str = TOKENIZE_COMMAND, checksums: bool = False) -> Self:
        """Open and check a split.

        Sizes, types and document boundaries are always checked, so that nothing is found out in the middle of
        a run.

        Args:
            folder: a folder made by `tokenize_corpus`.
            fix: the command an error names as the one that makes the folder again.
            checksums: also read every byte and compare it with the manifest's checksums.

        Raises:
            DataError: a file is missing, truncated, changed or of another type, or the split has no
            documents.
        """
        manifest = read_manifest(folder, MANIFEST_KIND, fix)
        try:
            entries = [entry for entry in manifest["files"] if entry["split"] == split]
            token_entries = [entry for entry in entries if entry["name"].endswith(TOKENS_SUFFIX)]
            num_documents = sum(entry["documents"] for entry in token_entries)
            tokenizer = manifest["tokenizer"]
            vocab_size, bos_id = tokenizer["vocab_size"], tokenizer["bos_id"]
            identity = [tokenizer, [[entry["name"], entry["sha256"]] for entry in entries]]
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{folder / MANIFEST_NAME} is damaged ({error!r})", fix) from None
        if num_documents == 0:
            raise DataError(f"{folder} holds no {split} documents", fix)

        def open_shard(entry: dict[str, Any]) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
            name, documents, tokens = entry["name"], entry["documents"], entry["tokens"]
            offsets_path = folder / f"{name.removesuffix(TOKENS_SUFFIX)}{OFFSETS_SUFFIX}"
            try:
                offsets = _load_offsets(offsets_path, documents, tokens, fix)
                return _map_tokens(folder / name, tokens, fix), offsets
            except (ValueError, OSError) as error:
                raise DataError(f"{folder / name} cannot be opened ({error})", fix) from None

        with ThreadPoolExecutor(NUM_OPENING_THREADS) as pool:
            for _ in pool.map(lambda entry: verify_files(folder, [entry], fix, checksums), entries):
                pass
            opened = list(pool.map(open_shard, token_entries))
        shards = [tokens for tokens, _ in opened]
        shard_starts = np.cumsum([0, *map(len, shards)]).tolist()
        offsets = [local[:-1] + start for (_, local), start in zip(opened, shard_starts)]
        return cls(
            folder=folder,
            split=split,
            num_documents=num_documents,
            num_tokens=shard_starts[-1],
            bos_id=bos_id,
            vocab_size=vocab_size,
            fingerprint=fingerprint(identity),
            _shards=shards,
            _shard_starts=shard_starts[:-1],
            _offsets=np.concatenate([*offsets, np.array([shard_starts[-1]], dtype=np.int64)]),
        )

    @property
    def lengths(self) -> NDArray[np.int64]:
        """The length in tokens of every document, BOS included."""
        return np.diff(self._offsets)

    def lengths_of(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """The lengths in tokens of some documents, BOS included."""
        return self._offsets[documents + 1] - self._offsets[documents]

    def document(self, index: int) -> NDArray[np.uint16]:
        """A read-only view of one document's tokens."""
        return self.piece(index, 0, self._offsets.item(index + 1) - self._offsets.item(index))

    def piece(self, index: int, start: int, stop: int) -> NDArray[np.uint16]:
        """A read-only view of one document's tokens from `start` to `stop`, which must lie within it."""
        first = self._offsets.item(index)
        # Of shards that start at the same token all but the last are empty, and bisect_right finds the last.
        shard = bisect_right(self._shard_starts, first) - 1
        at = first - self._shard_starts[shard]
        return self._shards[shard][at + start : at + stop]

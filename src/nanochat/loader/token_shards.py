"""Token shards: text that was tokenised once, memory-mapped by every rank of every run.

A folder `tokens/` holds, for each shard of text,

    train_00000.tokens.npy    uint16, all documents one after another, each beginning with BOS
    train_00000.offsets.npy   int64, document i is tokens[offsets[i]:offsets[i + 1]]

and the same for `val`, and a manifest. Plain `.npy` because every tool of the field reads it. Conversations have one
file more, with the same offsets:

    train_00000.trained.npy   uint8, 1 where the model is trained to say the token, 0 where it only reads it
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from nanochat.errors import DataError
from nanochat.files import MANIFEST_NAME, file_entry, fingerprint, read_manifest, verify_files, whole_file

Split = Literal["train", "val"]

# Part of a document: (document, start, stop), in tokens, of which the document's own first one is BOS.
Piece = tuple[int, int, int]

MANIFEST_KIND = "tokens"
TOKENS_SUFFIX = ".tokens.npy"
OFFSETS_SUFFIX = ".offsets.npy"
TRAINED_SUFFIX = ".trained.npy"
TOKENIZE_COMMAND = "nanochat data tokenize"

# uint16 halves the bytes to read of every wider type and holds every vocabulary this project trains.
MAX_VOCAB_SIZE = 2**16

# Opening thousands of shards waits on the metadata server of a cluster file system, not on a core.
NUM_OPENING_THREADS = 16


def write_shard(
    folder: Path,
    stem: str,
    split: Split,
    tokens: NDArray[np.uint16],
    offsets: NDArray[np.int64],
    trained: NDArray[np.uint8] | None = None,
) -> list[dict[str, Any]]:
    """Write one shard's files atomically.

    Args:
        stem: the shard's name without suffixes, `train_00000`.
        tokens: all documents one after another, each beginning with BOS.
        offsets: `documents + 1` boundaries, from 0 to `len(tokens)`.
        trained: of conversations, 1 for each token that is trained on.

    Returns:
        The files' manifest entries.
    """
    counts = {"split": split, "documents": len(offsets) - 1, "tokens": len(tokens)}
    arrays: dict[str, NDArray[Any]] = {TOKENS_SUFFIX: tokens, OFFSETS_SUFFIX: offsets}
    if trained is not None:
        arrays[TRAINED_SUFFIX] = trained
    entries = []
    for suffix, array in arrays.items():
        path = folder / f"{stem}{suffix}"
        with whole_file(path) as temporary, temporary.open("wb") as stream:
            np.save(stream, array, allow_pickle=False)
        entries.append(file_entry(path, **counts))
    return entries


def _map_array(path: Path, dtype: type[np.unsignedinteger[Any]], size: int, fix: str) -> NDArray[Any]:
    """Map a file of one dimension read-only, without keeping it open.

    numpy's and Python's own maps each hold a file descriptor, and a usual limit of 1,024 of them would stop a
    run of a few thousand shards. torch closes the file as soon as it is mapped.
    """
    import torch

    header = np.load(path, mmap_mode="r", allow_pickle=False)
    name = np.dtype(dtype).name
    if header.dtype != dtype or header.shape != (size,):
        raise DataError(f"{path} holds {header.dtype}{list(header.shape)}, expected {name}[{size}]", fix)
    skip = header.offset // header.itemsize
    whole = torch.from_file(str(path), shared=False, size=skip + size, dtype=getattr(torch, name))
    array: NDArray[Any] = whole.numpy()[skip:]
    array.flags.writeable = False
    return array


def _load_offsets(path: Path, num_documents: int, num_tokens: int, fix: str) -> NDArray[np.int64]:
    offsets: NDArray[np.int64] = np.load(path, allow_pickle=False)
    if offsets.dtype != np.int64 or offsets.shape != (num_documents + 1,):
        found = f"{offsets.dtype}{list(offsets.shape)}"
        raise DataError(f"{path} holds {found}, expected int64[{num_documents + 1}]", fix)
    if offsets[0] != 0 or offsets[-1] != num_tokens or (np.diff(offsets) < 1).any():
        raise DataError(f"{path} does not cut {num_tokens} tokens into {num_documents} documents", fix)
    return offsets


def split_fingerprint(manifest: dict[str, Any], split: Split) -> str:
    """Equal exactly when tokens, document boundaries and tokenizer of a split are."""
    entries = [entry for entry in manifest["files"] if entry["split"] == split]
    return fingerprint([manifest["tokenizer"], [[entry["name"], entry["sha256"]] for entry in entries]])


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
    _trained_shards: Sequence[NDArray[np.uint8]]
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
            vocab_size, bos_id = manifest["tokenizer"]["vocab_size"], manifest["tokenizer"]["bos_id"]
            identity = split_fingerprint(manifest, split)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{folder / MANIFEST_NAME} is damaged ({error!r})", fix) from None
        if num_documents == 0:
            raise DataError(f"{folder} holds no {split} documents", fix)

        names = {entry["name"] for entry in entries}

        def open_shard(
            entry: dict[str, Any],
        ) -> tuple[NDArray[np.uint16], NDArray[np.int64], NDArray[np.uint8] | None]:
            name, documents, tokens = entry["name"], entry["documents"], entry["tokens"]
            stem = name.removesuffix(TOKENS_SUFFIX)
            mask = f"{stem}{TRAINED_SUFFIX}"
            try:
                offsets = _load_offsets(folder / f"{stem}{OFFSETS_SUFFIX}", documents, tokens, fix)
                trained = _map_array(folder / mask, np.uint8, tokens, fix) if mask in names else None
                return _map_array(folder / name, np.uint16, tokens, fix), offsets, trained
            except (ValueError, OSError) as error:
                raise DataError(f"{folder / name} cannot be opened ({error})", fix) from None

        with ThreadPoolExecutor(NUM_OPENING_THREADS) as pool:
            for _ in pool.map(lambda entry: verify_files(folder, [entry], fix, checksums), entries):
                pass
            opened = list(pool.map(open_shard, token_entries))
        shards = [tokens for tokens, _, _ in opened]
        trained_shards = [trained for _, _, trained in opened if trained is not None]
        if len(trained_shards) not in (0, len(shards)):
            raise DataError(f"{folder} says of some {split} shards only which tokens are trained on", fix)
        shard_starts = np.cumsum([0, *map(len, shards)]).tolist()
        offsets = [local[:-1] + start for (_, local, _), start in zip(opened, shard_starts)]
        return cls(
            folder=folder,
            split=split,
            num_documents=num_documents,
            num_tokens=shard_starts[-1],
            bos_id=bos_id,
            vocab_size=vocab_size,
            fingerprint=identity,
            _shards=shards,
            _trained_shards=trained_shards,
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

    @property
    def num_shards(self) -> int:
        """How many files the tokens are in."""
        return len(self._shards)

    @property
    def is_masked(self) -> bool:
        """Whether only some of the tokens are trained on, as in conversations."""
        return bool(self._trained_shards)

    def document(self, index: int) -> NDArray[np.uint16]:
        """A read-only view of one document's tokens."""
        return self.pieces([(index, 0, self._offsets.item(index + 1) - self._offsets.item(index))])[0]

    def pieces(self, plan: Iterable[Piece]) -> list[NDArray[np.uint16]]:
        """Read-only views of the tokens of some pieces."""
        return [self._shards[shard][start:stop] for shard, start, stop in self._places(plan)]

    def trained_pieces(self, plan: Iterable[Piece]) -> list[NDArray[np.uint8]]:
        """Which of the tokens of `pieces` are trained on, 1 or 0; only of a data set that `is_masked`."""
        return [self._trained_shards[shard][start:stop] for shard, start, stop in self._places(plan)]

    def _places(self, plan: Iterable[Piece]) -> Iterator[tuple[int, int, int]]:
        """The shard of each piece, and where in it the piece starts and stops."""
        first_token_of, shard_starts = self._offsets.item, self._shard_starts
        for document, start, stop in plan:
            first = first_token_of(document)
            # Of shards that start at the same token all but the last are empty, and bisect_right finds the last.
            shard = bisect_right(shard_starts, first) - 1
            first -= shard_starts[shard]
            yield shard, first + start, first + stop

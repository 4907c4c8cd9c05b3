"""Many documents to token ids at once, on one core: by fastokens where it is installed, else by tiktoken.

The ids are the same. fastokens has taken a third to a fifth of tiktoken's CPU time; it is an option, as not every
machine has a build of it.
"""

import os
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from nanochat.errors import DataError
from nanochat.files import write_text
from nanochat.tokenizer.tokenizer import RANKS_NAME, Tokenizer, safe_parts

if TYPE_CHECKING:
    import fastokens

THREADS_VARIABLE = "FASTOKENS_BPE_THREADS"


class BulkEncoder:
    """The ids that `Tokenizer.encode` gives, with `<|bos|>` in front of each document, in one array.

    Args:
        tokenizer: its ids fit into uint16.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, documents: Sequence[str]) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.int64]]:
        """The ids of all documents, one after the other, and how many are each one's.

        What fastokens cannot encode, such as surrogates, goes through tiktoken with the rest of its batch.

        Raises:
            DataError: fastokens encodes the first document otherwise than tiktoken.
        """
        if self._fast is not None:
            try:
                ids, lengths = self._encode_fast(self._fast, documents)
            except ValueError:
                pass
            else:
                self._check(documents[:1], ids, lengths)
                return ids, lengths
        return self._encode_plainly(documents)

    @cached_property
    def _fast(self) -> "fastokens.Tokenizer | None":
        """Made at the first use: it takes about a second, which a corpus that is found finished need not cost."""
        return load_fast(self._tokenizer)

    def _encode_fast(
        self, fast: "fastokens.Tokenizer", documents: Sequence[str]
    ) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.int64]]:
        parts: list[str] = []
        first_parts = [0]
        for document in documents:
            parts.extend(safe_parts(document))
            first_parts.append(len(parts))
        id_bytes, offset_bytes = fast.encode_batch_flat(parts)
        ids = np.frombuffer(id_bytes, "<u4").astype(np.uint16)
        starts = np.frombuffer(offset_bytes, "<u8").astype(np.int64)[first_parts]
        return np.insert(ids, starts[:-1], self._tokenizer.bos_id), np.diff(starts) + 1

    def _encode_plainly(self, documents: Sequence[str]) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.int64]]:
        ids, lengths = array("H"), array("q")
        for document in documents:
            encoded = self._tokenizer.encode(document)
            ids.append(self._tokenizer.bos_id)
            ids.fromlist(encoded)
            lengths.append(1 + len(encoded))
        return np.frombuffer(ids, np.uint16), np.frombuffer(lengths, np.int64)

    def _check(self, documents: Sequence[str], ids: npt.NDArray[np.uint16], lengths: npt.NDArray[np.int64]) -> None:
        """A release with another idea of the split pattern must not make shards that no other machine can repeat."""
        for document in documents:
            if ids[1 : lengths[0]].tolist() != self._tokenizer.encode(document):
                raise DataError(
                    f"fastokens {version('fastokens')} and tiktoken {version('tiktoken')} encode a text differently;"
                    " nothing of its shard was kept",
                    "pip uninstall fastokens, and run the same command",
                )


def load_fast(tokenizer: Tokenizer) -> "fastokens.Tokenizer | None":
    """The same tokenizer in fastokens; None where that is not installed, of another make, or does not take it."""
    try:
        import fastokens

        with tempfile.TemporaryDirectory() as folder, _one_thread():
            write_text(Path(folder, RANKS_NAME), tokenizer.ranks())
            fast = fastokens.Tokenizer.from_tiktoken(str(Path(folder, RANKS_NAME)), pattern=tokenizer.pattern)
            fast.encode_batch_flat(["the first text starts the threads"])
    except (ImportError, AttributeError, TypeError, ValueError):
        return None
    return fast


@contextmanager
def _one_thread() -> Iterator[None]:
    """Have fastokens, when it is first used in this process, start no threads beside the caller's.

    Each worker has one core. And on several threads it cuts long texts up and mends the seams, where earlier releases
    gave other ids (crusoecloud/fastokens, issue 67).
    """
    before = os.environ.get(THREADS_VARIABLE)
    os.environ[THREADS_VARIABLE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[THREADS_VARIABLE]
        else:
            os.environ[THREADS_VARIABLE] = before

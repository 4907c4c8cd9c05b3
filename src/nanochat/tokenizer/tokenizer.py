"""The tokenizer: byte-level BPE, applied by tiktoken and stored as data.

Every text has an encoding, because the 256 single bytes are tokens. Text can never produce a special token: a
user who types `<|assistant_end|>` gets the ordinary tokens of those characters. Special ids are placed by the
code that renders conversations, through `special_id`.
"""

import base64
import binascii
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tiktoken

from nanochat.errors import DataError
from nanochat.files import (
    file_entry,
    fingerprint,
    read_json,
    read_manifest,
    verify_files,
    whole_folder,
    write_json,
    write_manifest,
    write_text,
)
from nanochat.tokenizer.huggingface import huggingface_tokenizer

# The conversation format of karpathy/nanochat. Their ids follow the mergeable ranks, in this order.
SPECIAL_TOKENS = (
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)

RANKS_NAME = "ranks.tiktoken"
CONFIG_NAME = "config.json"
HUGGINGFACE_NAME = "tokenizer.json"
SCHEMA = 1
FIX = "nanochat tokenizer train"

# Characters. tiktoken's regex engine keeps a backtracking state per character of a whitespace run, and panics
# (which is not even an Exception) when they are a million. Measured with tiktoken 0.14: 999,998 spaces pass,
# 999,999 do not.
WHITESPACE_RUN_LIMIT = 500_000

TEXTS_PER_TASK = 64


class Tokenizer:
    """A byte-level BPE vocabulary and the pattern that splits text before merging.

    Args:
        mergeable_tokens: the bytes of every ordinary token; the index is its rank and its id.
        pattern: regular expression whose matches are encoded independently of each other.
        digit_group: the largest number of digits the pattern keeps together, recorded for the reader.
        corpus_fingerprint: which text it was trained on, recorded for the reader; None if unknown.

    Raises:
        ValueError: a token occurs twice, or one of the 256 single bytes is missing.
    """

    def __init__(
        self,
        mergeable_tokens: Sequence[bytes],
        pattern: str,
        *,
        digit_group: int,
        corpus_fingerprint: str | None = None,
    ) -> None:
        ranks = {token: rank for rank, token in enumerate(mergeable_tokens)}
        if len(ranks) != len(mergeable_tokens):
            raise ValueError("a token occurs twice in the vocabulary")
        if not all(bytes([value]) in ranks for value in range(256)):
            raise ValueError("the vocabulary lacks some of the 256 single bytes")
        self.mergeable_tokens = tuple(mergeable_tokens)
        self.pattern = pattern
        self.digit_group = digit_group
        self.corpus_fingerprint = corpus_fingerprint
        self.special_ids = {name: len(ranks) + index for index, name in enumerate(SPECIAL_TOKENS)}
        self._encoding = tiktoken.Encoding(
            "nanochat", pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.special_ids
        )

    @property
    def vocab_size(self) -> int:
        """Number of ids: mergeable and special tokens together."""
        return len(self.mergeable_tokens) + len(SPECIAL_TOKENS)

    @property
    def bos_id(self) -> int:
        """The id that starts every document and every conversation."""
        return self.special_ids["<|bos|>"]

    def special_id(self, name: str) -> int:
        """The id of a special token, for example `<|user_start|>`.

        Raises:
            KeyError: there is no special token of that name.
        """
        return self.special_ids[name]

    @cached_property
    def fingerprint(self) -> str:
        """The same on every machine; equal exactly when tokens, pattern and special tokens are."""
        return fingerprint(
            {
                "pattern": self.pattern,
                "special_tokens": SPECIAL_TOKENS,
                "tokens": [token.hex() for token in self.mergeable_tokens],
            }
        )

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without `<|bos|>`. Special-token text inside it is plain text.

        Every `str` is accepted. Surrogates, which no UTF-8 can hold, are mended by tiktoken: a pair becomes
        the character it stands for, a lone one becomes U+FFFD. Any other text comes back from `decode`
        unchanged. A run of more than 500,000 whitespace characters is encoded in parts, see
        `WHITESPACE_RUN_LIMIT`.
        """
        if len(text) <= WHITESPACE_RUN_LIMIT:
            return self._encoding.encode_ordinary(text)
        return [token_id for part in safe_parts(text) for token_id in self._encoding.encode_ordinary(part)]

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[list[int]]:
        """The ids of each text, in order.

        One thread runs a plain loop, which is faster than tiktoken's batch call: that one queues every text
        by itself. More threads take 64 texts at a time for the same reason.
        """
        if num_threads == 1:
            return [self.encode(text) for text in texts]
        tasks = [texts[start : start + TEXTS_PER_TASK] for start in range(0, len(texts), TEXTS_PER_TASK)]
        with ThreadPoolExecutor(num_threads) as pool:
            return [ids for batch in pool.map(self.encode_batch, tasks) for ids in batch]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids; bytes that are not UTF-8 become U+FFFD, special tokens become their names.

        Raises:
            KeyError: an id is not in the vocabulary.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes of some ids, which may end within a character: what a streaming reader needs.

        Raises:
            KeyError: an id is not in the vocabulary.
        """
        return self._encoding.decode_bytes(ids)

    def token_bytes(self) -> npt.NDArray[np.int64]:
        """UTF-8 bytes per id, shape (vocab_size,); 0 for special tokens, which stand for no text.

        Bits per byte divides by these, so that tokenizers with different vocabularies compare.
        """
        lengths = [len(token) for token in self.mergeable_tokens] + [0] * len(SPECIAL_TOKENS)
        return np.array(lengths, dtype=np.int64)

    def ranks(self) -> str:
        """The mergeable tokens in tiktoken's file format, as `parse_ranks` reads it."""
        return "".join(f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(self.mergeable_tokens))

    def save(self, folder: Path) -> None:
        """Write the tokenizer as a folder that appears whole or not at all, replacing one that is there.

        `ranks.tiktoken` and `config.json` are what `load` reads; `tokenizer.json` is the same tokenizer for
        Hugging Face software; `manifest.json` holds their checksums.

        Raises:
            OSError: the folder cannot be written. An older tokenizer in it is then untouched.
        """
        config = {
            "pattern": self.pattern,
            "digit_group": self.digit_group,
            "special_tokens": SPECIAL_TOKENS,
            "vocab_size": self.vocab_size,
            "corpus_fingerprint": self.corpus_fingerprint,
        }
        with whole_folder(folder) as new:
            write_text(new / RANKS_NAME, self.ranks())
            write_json(new / CONFIG_NAME, config)
            write_text(new / HUGGINGFACE_NAME, huggingface_tokenizer(self).to_str())
            files = [file_entry(new / name) for name in (RANKS_NAME, CONFIG_NAME, HUGGINGFACE_NAME)]
            write_manifest(
                new,
                "tokenizer",
                files,
                schema=SCHEMA,
                vocab_size=self.vocab_size,
                tokenizer_fingerprint=self.fingerprint,
            )

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Read a tokenizer that `save` wrote, after checking every byte against its manifest.

        Raises:
            DataError: it is missing, damaged, or written by a version with another format.
        """
        manifest = read_manifest(folder, "tokenizer", FIX)
        if manifest.get("schema") != SCHEMA:
            raise DataError(f"{folder} has tokenizer format {manifest.get('schema')}, not {SCHEMA}", FIX)
        verify_files(folder, manifest["files"], FIX)
        config = read_json(folder / CONFIG_NAME, FIX)
        if tuple(config["special_tokens"]) != SPECIAL_TOKENS:
            raise DataError(f"{folder / CONFIG_NAME} has other special tokens than this version", FIX)
        try:
            return cls(
                parse_ranks((folder / RANKS_NAME).read_bytes()),
                config["pattern"],
                digit_group=config["digit_group"],
                corpus_fingerprint=config["corpus_fingerprint"],
            )
        except ValueError as error:
            raise DataError(f"{folder / RANKS_NAME} is damaged ({error})", FIX) from None


def parse_ranks(content: bytes) -> list[bytes]:
    """Read tiktoken's file format: one line per token, base64 bytes and rank, ranks counting up from 0.

    Raises:
        ValueError: names the first line that is not so.
    """
    tokens = []
    for rank, line in enumerate(content.splitlines()):
        encoded, _, written_rank = line.partition(b" ")
        try:
            token = base64.b64decode(encoded, validate=True)
        except binascii.Error as error:
            raise ValueError(f"line {rank + 1} is not base64: {error}") from None
        if written_rank != b"%d" % rank or not token:
            raise ValueError(f"line {rank + 1} does not hold the token of rank {rank}")
        tokens.append(token)
    return tokens


def safe_parts(text: str) -> Iterator[str]:
    """Cut a text inside whitespace runs that the regex engine cannot take whole.

    Python's `\\s` contains all whitespace of tiktoken's engine. The look-behind keeps the search linear.
    """
    if len(text) <= WHITESPACE_RUN_LIMIT:
        yield text
        return
    start = 0
    for run in re.finditer(rf"(?<!\s)\s{{{WHITESPACE_RUN_LIMIT},}}", text):
        for cut in range(run.start() + WHITESPACE_RUN_LIMIT, run.end(), WHITESPACE_RUN_LIMIT):
            yield text[start:cut]
            start = cut
    yield text[start:]

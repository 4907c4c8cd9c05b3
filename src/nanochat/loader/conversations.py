"""Conversations to token shards with a mask, once, on CPU, as text is tokenised."""

import random
from array import array
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nanochat.corpus.conversation import Conversation
from nanochat.errors import DataError
from nanochat.files import whole_folder, write_manifest
from nanochat.loader.token_shards import MANIFEST_KIND, Split, write_shard
from nanochat.tokenizer.conversation import render_conversation
from nanochat.tokenizer.tokenizer import Tokenizer

# Tokens held in memory before they are written: 200 MB with their mask.
TOKENS_PER_SHARD = 64 * 2**20
SHUFFLE_SEED = 0


class _ShardWriter:
    """Collects rendered conversations and writes a shard whenever enough are there."""

    def __init__(self, folder: Path, split: Split) -> None:
        self.files: list[dict[str, Any]] = []
        self.counts = {"documents": 0, "tokens": 0, "trained_tokens": 0, "cut": 0, "left_out": 0}
        self._folder = folder
        self._split: Split = split
        self._begin()

    def _begin(self) -> None:
        self._tokens, self._trained, self._offsets = array("H"), array("B"), array("q", [0])

    def add(self, tokenizer: Tokenizer, conversation: Conversation, max_tokens: int) -> None:
        """Render and keep a conversation, unless its first question alone is too long to leave room for an answer."""
        rendered = render_conversation(tokenizer, conversation, max_tokens)
        if not any(rendered.trained):
            self.counts["left_out"] += 1
            return
        self.counts["cut"] += rendered.is_cut
        self._tokens.fromlist(rendered.ids)
        self._trained.fromlist(list(map(int, rendered.trained)))
        self._offsets.append(len(self._tokens))
        self.counts["documents"] += 1
        self.counts["tokens"] += len(rendered.ids)
        self.counts["trained_tokens"] += sum(rendered.trained)
        if len(self._tokens) >= TOKENS_PER_SHARD:
            self.flush()

    def flush(self) -> None:
        """Write what has been collected."""
        if len(self._offsets) > 1:
            stem = f"{self._split}_{len(self.files) // 3:05d}"
            self.files += write_shard(
                self._folder,
                stem,
                self._split,
                np.frombuffer(self._tokens, np.uint16),
                np.frombuffer(self._offsets, np.int64),
                np.frombuffer(self._trained, np.uint8),
            )
        self._begin()


def tokenize_conversations(
    conversations: Mapping[Split, Iterable[Conversation]],
    tokenizer: Tokenizer,
    out: Path,
    *,
    sequence_len: int,
    made_from: Mapping[str, Any],
    fix: str,
) -> dict[str, Any]:
    """Write `out` anew, whole or not at all.

    Args:
        conversations: what to train on, streamed, and what to validate on, which is shuffled, so that its first rows
            are a sample of all.
        tokenizer: the vocabulary.
        out: the folder of token shards.
        sequence_len: T; longer conversations are cut to the T + 1 tokens of a row, see `render_conversation`.
        made_from: whatever decides the conversations, recorded for the reader.
        fix: the command that an error names.

    Returns:
        The manifest of `out` (kind `tokens`); `totals` counts, per split, documents, tokens, trained tokens, how many
        of the documents were cut, and how many conversations were left out.

    Raises:
        DataError: a split has no conversation with an answer that fits.
    """
    validation = list(conversations["val"])
    random.Random(SHUFFLE_SEED).shuffle(validation)
    splits: dict[Split, Iterable[Conversation]] = {"train": conversations["train"], "val": validation}
    files: list[dict[str, Any]] = []
    totals: dict[str, dict[str, int]] = {}
    with whole_folder(out) as new:
        for split, source in splits.items():
            writer = _ShardWriter(new, split)
            for conversation in source:
                writer.add(tokenizer, conversation, sequence_len + 1)
            writer.flush()
            if not writer.files:
                raise DataError(f"no {split} conversation has an answer within {sequence_len} tokens", fix)
            files += writer.files
            totals[split] = writer.counts
        return write_manifest(
            new,
            MANIFEST_KIND,
            files,
            tokenizer={
                "fingerprint": tokenizer.fingerprint,
                "vocab_size": tokenizer.vocab_size,
                "bos_id": tokenizer.bos_id,
            },
            sequence_len=sequence_len,
            made_from=dict(made_from),
            totals=totals,
        )

"""Text shards to token shards: once, on CPU nodes, in parallel, and safe to kill at any moment.

Every shard is a task of its own with a receipt that says from which text and by which tokenizer it was made.
A rerun checks finished shards against their receipts and makes only what is missing or stale; the result is
the same bytes, however often it was interrupted and however many processes took part.
"""

import re
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from nanochat.corpus.shards import TEXT_COLUMN, open_corpus, read_column
from nanochat.corpus.workers import run_tasks
from nanochat.errors import DataError, UsageError
from nanochat.files import (
    MANIFEST_NAME,
    read_json,
    refuse_if_used,
    remove_stale_temporaries,
    use_folders,
    verify_files,
    write_json,
    write_manifest,
)
from nanochat.identity import usable_cores
from nanochat.loader.token_shards import (
    MANIFEST_KIND,
    MAX_VOCAB_SIZE,
    TOKENIZE_COMMAND,
    Split,
    write_shard,
)
from nanochat.tokenizer.bulk import BulkEncoder
from nanochat.tokenizer.tokenizer import Tokenizer

CORPUS_COMMAND = "nanochat data builtin (or the command that made this corpus)"
RECEIPT_SUFFIX = ".receipt.json"
TEXTS_PER_BATCH = 256

# To be raised when the same text and tokenizer give other bytes than before, so that old shards are made
# anew.
FORMAT = 1

# What this module may delete when it is no longer part of the corpus. Nothing else in the folder is touched.
OWN_FILES = re.compile(r"(train|val)_\d{5,}\.(tokens\.npy|offsets\.npy|receipt\.json)")


@dataclass(frozen=True)
class ShardTask:
    """One shard of text to tokenise, picklable and independent of all others."""

    corpus_folder: Path
    out: Path
    entry: dict[str, Any]
    stem: str
    split: Split
    tokenizer: dict[str, Any]

    @property
    def receipt_path(self) -> Path:
        """The file whose presence says that the shard is finished."""
        return self.out / f"{self.stem}{RECEIPT_SUFFIX}"

    @property
    def made_from(self) -> dict[str, Any]:
        """All that the shard's bytes depend on."""
        return {"format": FORMAT, "text_sha256": self.entry["sha256"], "tokenizer": self.tokenizer}


@dataclass(frozen=True)
class TokenizeProgress:
    """How far a tokenisation is, after another shard of it was finished or found finished."""

    shards_done: int
    num_shards: int
    tokens_done: int
    seconds: float


def tokenize_corpus(
    corpus_folder: Path,
    tokenizer_folder: Path,
    out: Path,
    *,
    workers: int | None = None,
    progress: Callable[[TokenizeProgress], None] | None = None,
) -> dict[str, Any]:
    """Tokenise a corpus into `out`, or complete and check what is already there.

    Shards of other text or another tokenizer are replaced. One call at a time may write to `out`.

    Args:
        corpus_folder: parquet shards with a manifest.
        tokenizer_folder: the tokenizer.
        out: the folder of token shards.
        workers: processes; by default one per usable core. The result does not depend on it.
        progress: told after every shard.

    Returns:
        The manifest of `out` (kind `tokens`).

    Raises:
        UsageError: the vocabulary does not fit into uint16, `workers` is less than 1, or a run reads `out`.
        DataError: corpus or tokenizer is missing or damaged.
        NanochatError: a worker process was killed or failed.
    """
    if workers is not None and workers < 1:
        raise UsageError(f"{workers} workers cannot do anything", "use --workers 1 or more")
    workers = workers or usable_cores()
    corpus = open_corpus(corpus_folder, CORPUS_COMMAND)
    tokenizer = Tokenizer.load(tokenizer_folder)
    if tokenizer.vocab_size > MAX_VOCAB_SIZE:
        raise UsageError(
            f"a vocabulary of {tokenizer.vocab_size:,} does not fit into uint16 token shards",
            f"train a tokenizer with --vocab-size {MAX_VOCAB_SIZE} or less",
        )
    about = {
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
    }
    tasks = _plan(corpus_folder, corpus.manifest["files"], out, about)
    out.mkdir(parents=True, exist_ok=True)
    refuse_if_used(out, str(out))
    remove_stale_temporaries(out)
    _retract_manifest(out, corpus.fingerprint, about)

    started = time.monotonic()
    tokens_done = 0
    receipts: dict[str, dict[str, Any]] = {}
    num_workers = min(workers, len(tasks))
    with use_folders(f"tokenising into {out}", corpus_folder):
        for task, receipt in _receipts(tasks, num_workers, tokenizer_folder, BulkEncoder(tokenizer)):
            receipts[task.stem] = receipt
            tokens_done += receipt["tokens"]
            if progress is not None:
                progress(TokenizeProgress(len(receipts), len(tasks), tokens_done, time.monotonic() - started))

    in_order = [receipts[task.stem] for task in tasks]
    files = [entry for receipt in in_order for entry in receipt["files"]]
    _remove_leftovers(out, {task.stem for task in tasks})
    totals = {
        split: {
            "shards": sum(task.split == split for task in tasks),
            **{
                key: sum(receipt[key] for task, receipt in zip(tasks, in_order) if task.split == split)
                for key in ("documents", "tokens", "text_bytes", "empty_texts_skipped")
            },
        }
        for split in ("train", "val")
    }
    return write_manifest(out, MANIFEST_KIND, files, tokenizer=about, corpus=corpus.fingerprint, totals=totals)


def tokenize_shard(task: ShardTask, encoder: BulkEncoder) -> dict[str, Any]:
    """Make one token shard, or check the one that is there. Returns its receipt.

    Empty texts are skipped and counted: a document that is BOS alone would teach that BOS follows BOS.

    Raises:
        DataError: the text shard is missing, damaged or not what the corpus says; or fastokens gives wrong ids.
    """
    finished = _finished_receipt(task)
    if finished is not None:
        return finished
    verify_files(task.corpus_folder, [task.entry], CORPUS_COMMAND)
    tokens, lengths = array("H"), array("q", [0])
    text_bytes = empty = 0
    texts = read_column(task.corpus_folder / task.entry["name"], TEXT_COLUMN, CORPUS_COMMAND)
    while batch := list(islice(texts, TEXTS_PER_BATCH)):
        documents = [text for text in batch if text]
        empty += len(batch) - len(documents)
        text_bytes += sum(len(text.encode()) for text in documents)
        ids, id_counts = encoder.encode(documents)
        tokens.frombytes(ids.tobytes())
        lengths.frombytes(id_counts.tobytes())
    token_array, offset_array = np.frombuffer(tokens, np.uint16), np.frombuffer(lengths, np.int64).cumsum()
    files = write_shard(task.out, task.stem, task.split, token_array, offset_array)
    receipt = {
        "made_from": task.made_from,
        "documents": len(offset_array) - 1,
        "tokens": len(token_array),
        "text_bytes": text_bytes,
        "empty_texts_skipped": empty,
        "files": files,
    }
    write_json(task.receipt_path, receipt)
    return receipt


def _plan(corpus_folder: Path, entries: list[dict[str, Any]], out: Path, tokenizer: dict[str, Any]) -> list[ShardTask]:
    tasks = []
    numbers: dict[Split, int] = {"train": 0, "val": 0}
    for entry in entries:
        split: Split = "val" if entry["split"] == "val" else "train"
        stem = f"{split}_{numbers[split]:05d}"
        numbers[split] += 1
        tasks.append(ShardTask(corpus_folder, out, entry, stem, split, tokenizer))
    return tasks


def _finished_receipt(task: ShardTask) -> dict[str, Any] | None:
    """The receipt of an earlier run if it is about the same text and tokenizer and its files are intact."""
    try:
        receipt: dict[str, Any] = read_json(task.receipt_path)
        if receipt["made_from"] != task.made_from:
            return None
        verify_files(task.out, receipt["files"], TOKENIZE_COMMAND)
    except (DataError, KeyError, TypeError):
        return None
    return receipt


def _retract_manifest(out: Path, corpus_fingerprint: str, tokenizer: dict[str, Any]) -> None:
    """Remove a manifest that is about other data, before the first shard under it changes."""
    path = out / MANIFEST_NAME
    try:
        manifest = read_json(path)
        current = manifest["corpus"] == corpus_fingerprint and manifest["tokenizer"] == tokenizer
    except (DataError, KeyError, TypeError):
        current = False
    if not current:
        path.unlink(missing_ok=True)


def _remove_leftovers(out: Path, stems: set[str]) -> None:
    for path in out.iterdir():
        if OWN_FILES.fullmatch(path.name) and path.name.partition(".")[0] not in stems:
            path.unlink()


def _receipts(
    tasks: list[ShardTask], num_workers: int, tokenizer_folder: Path, encoder: BulkEncoder
) -> Iterator[tuple[ShardTask, dict[str, Any]]]:
    """Yield tasks with their receipts as they finish. One worker is this process itself, ready at once."""
    if num_workers == 1:
        for task in tasks:
            yield task, tokenize_shard(task, encoder)
        return
    work = partial(_tokenize_in_worker, tokenizer_folder)
    yield from run_tasks(work, tasks, num_workers, f"tokenised {tasks[0].corpus_folder}")


def _tokenize_in_worker(tokenizer_folder: Path, task: ShardTask) -> dict[str, Any]:
    return tokenize_shard(task, _encoder_of_worker(tokenizer_folder))


@lru_cache(maxsize=1)
def _encoder_of_worker(folder: Path) -> BulkEncoder:
    """Loaded once per worker process. Not for the parent, in whose lifetime the folder may be replaced."""
    return BulkEncoder(Tokenizer.load(folder))

"""Parquet shards of text with a manifest: written whole or not at all, and read with every page checked.

A corpus is a folder of `shard_00000.parquet`, `shard_00001.parquet`, … with a column `text`, and others where its
source has some worth keeping. The last shard is the validation set, all others are for training; `manifest.json` says
what each must contain.

The validation set is chosen by the texts themselves: the documents with the smallest seeded digests. So it
is a uniform sample whatever order or kind the documents come in, it can be taken while streaming, and exact
copies of one document always fall on the same side. Cutting it from the end of the stream was the
alternative; that measures only the last file.
"""

import hashlib
import heapq
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nanochat.errors import DataError, UsageError
from nanochat.files import (
    MANIFEST_NAME,
    file_entry,
    fingerprint,
    read_manifest,
    sync_file,
    sync_folder,
    temporary_sibling,
    verify_files,
    write_manifest,
)

Split = Literal["train", "val"]

TEXT_COLUMN = "text"
TEXT_FIELD = pa.field(TEXT_COLUMN, pa.string(), nullable=False)
# How many tokens a row has by its publisher's count; the one other column that is added up.
COUNT_COLUMN = "token_count"
FIX_CORPUS = "nanochat data builtin, or: nanochat data local FOLDER; for shards already there: nanochat data adopt"
# Readers hold one row group in memory. 500–5,000 rows of web text read fastest.
ROW_GROUP_ROWS = 1024
ROW_GROUP_BYTES = 64 * 2**20
# A small corpus gives at most this share of its documents to validation, whatever number was asked for.
LARGEST_VALIDATION_SHARE = 0.1


@dataclass(frozen=True)
class Corpus:
    """A corpus whose files are all there with the size their manifest says."""

    folder: Path
    manifest: dict[str, Any]
    train_shards: tuple[Path, ...]
    val_shards: tuple[Path, ...]
    train_rows: int
    val_rows: int
    fingerprint: str


@dataclass
class _Cleaning:
    """Makes every text one that UTF-8 can hold, and counts what it had to change or leave out."""

    empty: int = 0
    repaired: int = 0

    def clean(self, texts: Iterable[str]) -> Iterator[str]:
        for text in texts:
            if not text.strip():
                self.empty += 1
                continue
            try:
                text.encode()
            except UnicodeEncodeError:
                self.repaired += 1
                # Half a surrogate pair becomes U+FFFD; two matching halves become the character they mean.
                yield text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            else:
                yield text


class _ValidationSample:
    """The `limit` distinct texts with the smallest digests among those seen so far.

    The largest digest kept only ever falls, so a text once sent to training never comes back as validation.
    """

    def __init__(self, limit: int, seed: int) -> None:
        self._limit = limit
        self._seed = seed
        self._largest_first: list[int] = []
        self._copies: dict[int, tuple[str, int]] = {}

    def training_texts(self, texts: Iterable[str]) -> Iterator[str]:
        """Keep the sample, pass on everything else."""
        rows = 0
        for text in texts:
            rows += 1
            yield from self._offer(text)
        held = sum(copies for _, copies in self._copies.values())
        while len(self._largest_first) > 1 and held > rows * LARGEST_VALIDATION_SHARE:
            evicted = self._evict()
            held -= len(evicted)
            yield from evicted

    def texts(self) -> Iterator[str]:
        """The sample in digest order, so that kinds of text stay mixed."""
        for digest in sorted(self._copies):
            text, copies = self._copies[digest]
            yield from [text] * copies

    def _offer(self, text: str) -> Iterator[str]:
        digest = text_digest(text, self._seed)
        if digest in self._copies:
            self._copies[digest] = (text, self._copies[digest][1] + 1)
        elif len(self._largest_first) == self._limit and digest > -self._largest_first[0]:
            yield text
        else:
            heapq.heappush(self._largest_first, -digest)
            self._copies[digest] = (text, 1)
            if len(self._largest_first) > self._limit:
                yield from self._evict()

    def _evict(self) -> list[str]:
        text, copies = self._copies.pop(-heapq.heappop(self._largest_first))
        return [text] * copies


def text_digest(text: str | bytes, seed: int) -> int:
    """A 128-bit number that depends on the text (as bytes: in UTF-8) and the seed alone, the same on every machine."""
    content = text.encode() if isinstance(text, str) else text
    return int.from_bytes(hashlib.blake2b(content, digest_size=16, key=str(seed).encode()).digest())


def write_corpus(
    folder: Path,
    texts: Iterable[str],
    *,
    rows_per_shard: int,
    source: dict[str, Any],
    validation_rows: int,
    seed: int = 0,
    details: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Stream texts into a new corpus at `folder`, or keep the one that is already there if it is the same.

    In memory are one row group and the validation set, never more. Empty texts are left out and lone
    surrogates become U+FFFD; the manifest counts both. Training rows keep the order in which they came, but
    for the few that were held back as validation candidates first.

    Args:
        folder: where the corpus will be. It appears under this name when it is complete.
        texts: the documents. They are not touched if the corpus already exists.
        rows_per_shard: documents in one training shard.
        source: where the texts come from, JSON-able: two equal sources mean the same texts.
        validation_rows: distinct documents in the validation set, but, if more than one, with their copies at most a
            tenth of all.
        seed: chooses another validation set.
        details: more to record, read after the last text, so that whoever yields the texts can count in it.

    Returns:
        The manifest (kind `corpus`): per file rows, characters, UTF-8 bytes, checksum, split; totals; schema.

    Raises:
        UsageError: `folder` holds something else, or there are not two different documents.
    """
    if rows_per_shard < 1 or validation_rows < 1:
        raise UsageError(
            f"a corpus with {rows_per_shard} rows per shard and {validation_rows} validation rows is empty",
            "ask for at least 1 of each",
        )
    identity = {
        "source": source,
        "layout": {"rows_per_shard": rows_per_shard, "validation_rows": validation_rows, "seed": seed},
    }
    existing = existing_manifest(folder, identity)
    if existing is not None:
        return existing
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = temporary_sibling(folder)
    building.mkdir()
    try:
        cleaning = _Cleaning()
        sample = _ValidationSample(validation_rows, seed)
        train_texts = sample.training_texts(cleaning.clean(texts))
        files = _write_text_shards(building, train_texts, rows_per_shard)
        if not files:
            raise UsageError(
                f"{folder} would have nothing to train on: its texts hold fewer than two different documents",
                "give it more text",
            )
        files.append(write_shard(building / shard_name(len(files)), _tables(sample.texts()), "val"))
        manifest = write_manifest(
            building,
            "corpus",
            files,
            schema={TEXT_COLUMN: "string"},
            totals=corpus_totals(files),
            empty_texts_skipped=cleaning.empty,
            invalid_texts_repaired=cleaning.repaired,
            details=dict(details or {}),
            **identity,
        )
        try:
            building.rename(folder)
        except OSError:
            # Another process finished first. If it made the same corpus, that one is as good as ours.
            existing = existing_manifest(folder, identity)
            if existing is None:
                raise
            shutil.rmtree(building)
            return existing
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    sync_folder(folder.parent)
    return manifest


def open_corpus(folder: Path, fix: str, checksums: bool = False) -> Corpus:
    """Open a corpus and check that every file is there.

    Args:
        fix: the command that makes the corpus again, for the error.
        checksums: also read and check every byte.

    Raises:
        DataError: no manifest, a damaged manifest, or a file that is missing or not as its manifest says.
    """
    manifest = read_manifest(folder, "corpus", fix)
    try:
        files: list[dict[str, Any]] = manifest["files"]
        verify_files(folder, files, fix, checksums)
        train = [entry for entry in files if entry["split"] == "train"]
        val = [entry for entry in files if entry["split"] == "val"]
        corpus = Corpus(
            folder=folder,
            manifest=manifest,
            train_shards=tuple(folder / entry["name"] for entry in train),
            val_shards=tuple(folder / entry["name"] for entry in val),
            train_rows=sum(entry["rows"] for entry in train),
            val_rows=sum(entry["rows"] for entry in val),
            fingerprint=manifest["fingerprint"],
        )
    except (KeyError, TypeError) as error:
        raise DataError(f"{folder / MANIFEST_NAME} is damaged (no usable {error})", fix) from None
    if not corpus.train_rows or not corpus.val_rows:
        raise DataError(f"{folder} has {corpus.train_rows} training and {corpus.val_rows} validation rows", fix)
    return corpus


def shard_paths(folder: Path, split: Split, fix: str) -> tuple[Path, ...]:
    """The shards of one split, in order. Raises DataError as `open_corpus` does."""
    corpus = open_corpus(folder, fix)
    return corpus.train_shards if split == "train" else corpus.val_shards


def read_texts(folder: Path, split: Split, fix: str) -> Iterator[str]:
    """Yield every document of one split, in order, with one row group in memory.

    Raises:
        DataError: as `open_corpus`, or a shard is damaged inside.
    """
    for path in shard_paths(folder, split, fix):
        for text in read_column(path, TEXT_COLUMN, fix):
            if text is None:
                raise DataError(f"{path} has rows without text", fix)
            yield text


def read_column(path: Path, column: str, fix: str) -> Iterator[str | None]:
    """Yield one text column of a parquet file, row by row; `None` for a null.

    Raises:
        DataError: the file is truncated or damaged, or has no such column of strings.
    """
    for batch in _read_batches(path, column, fix):
        yield from batch.to_pylist()


def adopt(folder: Path) -> Corpus:
    """Give a manifest to parquet shards that another tool put into `folder`, after reading all of them.

    The last shard in name order becomes the validation set, as everywhere in this field. A folder that has a
    manifest is only opened.

    Raises:
        DataError: fewer than two shards; a shard that is empty, truncated, or without a full column `text`.
    """
    fix = "download it again, or take it out of the folder"
    if (folder / MANIFEST_NAME).is_file():
        return open_corpus(folder, fix)
    paths = sorted(folder.glob("shard_*.parquet"))
    if len(paths) < 2:
        raise DataError(
            f"{folder} has {len(paths)} shard_*.parquet: it takes one to train on and one to validate on",
            "move the folder and import it, which cuts a validation set: nanochat data local FOLDER",
        )
    files = [describe_shard(path, "val" if path == paths[-1] else "train", fix) for path in paths]
    write_manifest(
        folder,
        "corpus",
        files,
        schema={TEXT_COLUMN: "string"},
        totals=corpus_totals(files),
        source={"name": "adopted"},
    )
    return open_corpus(folder, fix)


def existing_manifest(folder: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of the corpus at `folder` if it is the one asked for, `None` if nothing is there.

    Raises:
        UsageError: something else is there.
        DataError: the corpus is there and not whole.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    elsewhere = f"set NANOCHAT_BASE_DIR to another folder, or remove this corpus: rm -r {folder}"
    if not (folder / MANIFEST_NAME).is_file():
        raise UsageError(f"{folder} already holds something that is not a corpus with a manifest", elsewhere)
    manifest = open_corpus(folder, f"{elsewhere}, then run this again").manifest
    if fingerprint({key: manifest.get(key) for key in identity}) != fingerprint(identity):
        raise UsageError(f"{folder} already holds another corpus (from {say_source(manifest)})", elsewhere)
    return manifest


def say_source(manifest: dict[str, Any]) -> str:
    """Where the texts of a corpus are from, in a line for people."""
    known = {key: value for key, value in manifest.get("source", {}).items() if value is not None}
    return " ".join(f"{key}={value}" for key, value in known.items()) or "unknown"


def shard_name(index: int) -> str:
    """The name of a corpus' shard."""
    return f"shard_{index:05d}.parquet"


def write_shard(
    path: Path, tables: Iterable[pa.Table], split: Split, schema: pa.Schema | None = None
) -> dict[str, Any]:
    """Write one shard and sync it. Its bytes depend on the rows alone, not on how `tables` divide them.

    Args:
        path: written in place: put it into a folder that is not yet under its final name.
        tables: rows with a column `text` that holds valid UTF-8 and no null; one row group is in memory.
        split: the split for the manifest.
        schema: of the tables; only `text` by default.

    Returns:
        The manifest's entry: rows, characters, UTF-8 bytes, checksum, split; also tokens if there is `token_count`.
    """
    schema = schema or pa.schema([TEXT_FIELD])
    counts = dict.fromkeys(("rows", "characters", "text_bytes"), 0)
    if COUNT_COLUMN in schema.names:
        counts[COUNT_COLUMN] = 0
    # Documents hardly repeat, so a dictionary would only cost time. Page checksums let a reader notice a flipped bit.
    with pq.ParquetWriter(
        path, schema, compression="zstd", compression_level=3, use_dictionary=False, write_page_checksum=True
    ) as writer:
        for group in _row_groups(tables):
            writer.write_table(group, row_group_size=ROW_GROUP_ROWS)
            counts["rows"] += group.num_rows
            counts["characters"] += pc.sum(pc.utf8_length(group[TEXT_COLUMN])).as_py()
            counts["text_bytes"] += pc.sum(pc.binary_length(group[TEXT_COLUMN])).as_py()
            if COUNT_COLUMN in counts:
                counts[COUNT_COLUMN] += pc.sum(group[COUNT_COLUMN]).as_py() or 0
    sync_file(path)
    return file_entry(path, **counts, split=split)


def _row_groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Groups that are bounded in rows and in bytes: one group of huge documents must still fit in memory."""
    waiting: list[pa.Table] = []
    rows = size = 0
    for table in tables:
        while table.num_rows:
            lengths = pc.binary_length(table[TEXT_COLUMN].slice(0, ROW_GROUP_ROWS - rows)).to_numpy()
            sizes = size + np.cumsum(lengths, dtype=np.int64)
            taken = min(len(lengths), int(np.searchsorted(sizes, ROW_GROUP_BYTES)) + 1)
            waiting.append(table.slice(0, taken))
            rows, size, table = rows + taken, int(sizes[taken - 1]), table.slice(taken)
            if rows == ROW_GROUP_ROWS or size >= ROW_GROUP_BYTES:
                yield pa.concat_tables(waiting).combine_chunks()
                waiting, rows, size = [], 0, 0
    if waiting:
        yield pa.concat_tables(waiting).combine_chunks()


def _write_text_shards(folder: Path, texts: Iterator[str], rows_per_shard: int) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    for first in texts:
        shard = chain([first], islice(texts, rows_per_shard - 1))
        entries.append(write_shard(folder / shard_name(len(entries)), _tables(shard), "train"))
    return entries


def _tables(texts: Iterable[str]) -> Iterator[pa.Table]:
    schema = pa.schema([TEXT_FIELD])
    waiting: list[str] = []
    characters = 0
    for text in texts:
        waiting.append(text)
        characters += len(text)
        if len(waiting) == ROW_GROUP_ROWS or characters >= ROW_GROUP_BYTES:
            yield pa.table([pa.array(waiting, pa.string())], schema=schema)
            waiting, characters = [], 0
    if waiting:
        yield pa.table([pa.array(waiting, pa.string())], schema=schema)


def corpus_totals(files: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """What the files of each split hold together."""
    keys = [key for key in ("rows", "characters", "text_bytes", COUNT_COLUMN) if all(key in entry for entry in files)]
    return {
        split: {key: sum(entry[key] for entry in files if entry["split"] == split) for key in keys}
        for split in ("train", "val")
    }


def describe_shard(path: Path, split: Split, fix: str) -> dict[str, Any]:
    """The manifest's entry of a shard that another tool wrote, found by reading all of its texts.

    Raises:
        DataError: it is empty, damaged, or without a full column `text`; `fix` names what brings it again.
    """
    rows = characters = text_bytes = 0
    for array in _read_batches(path, TEXT_COLUMN, fix):
        if array.null_count:
            raise DataError(
                f"{path} has rows without text",
                "move the folder and import it, which leaves them out: nanochat data local FOLDER",
            )
        rows += len(array)
        characters += pc.sum(pc.utf8_length(array)).as_py() or 0
        text_bytes += pc.sum(pc.binary_length(array)).as_py() or 0
    if rows == 0:
        raise DataError(f"{path} has no rows", fix)
    return file_entry(path, rows=rows, characters=characters, text_bytes=text_bytes, split=split)


def _read_batches(path: Path, column: str, fix: str) -> Iterator[Any]:
    """Yield a string column as Arrow arrays of at most one row group's rows."""
    with (
        _as_data_error(path, fix),
        pq.ParquetFile(path, page_checksum_verification=True) as parquet,
    ):
        schema = parquet.schema_arrow
        other_column = "say which one holds the text: nanochat data local FOLDER --text-column NAME"
        if column not in schema.names:
            raise DataError(
                f"{path} has no column {column!r} (it has: {', '.join(schema.names) or 'none'})",
                other_column,
            )
        column_type = schema.field(column).type
        if not (pa.types.is_string(column_type) or pa.types.is_large_string(column_type)):
            raise DataError(
                f"{path}: column {column!r} holds {column_type}, not text",
                other_column,
            )
        for batch in parquet.iter_batches(batch_size=ROW_GROUP_ROWS, columns=[column]):
            yield batch.column(0)


@contextmanager
def _as_data_error(path: Path, fix: str) -> Iterator[None]:
    try:
        yield
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path} is damaged ({reason})", fix) from None

"""Text from a folder of the user's own files: parquet, JSON lines (plain or zstd), plain text, or a mix."""

import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from nanochat.corpus.shards import TEXT_COLUMN, read_column, write_corpus
from nanochat.errors import DataError, UsageError
from nanochat.files import fingerprint, sha256_file

SUFFIXES = (".parquet", ".jsonl", ".jsonl.zst", ".txt")
DAMAGED = "copy or download it again, or take it out of the folder"


@dataclass
class LocalCounts:
    """What was met in a folder: files read, files passed over, and rows that had no text (null)."""

    files: dict[str, int] = field(default_factory=dict)
    ignored_files: int = 0
    null_rows: int = 0


def find_text_files(folder: Path) -> tuple[list[Path], int]:
    """The usable files below `folder` and the number of others.

    Files come in the order of their relative names, not of the file system. Hidden files and folders are not
    looked into: `.git` and `.cache` hold no corpus. Links to files are followed, links to folders are not, so
    that no circle can form.

    Raises:
        UsageError: `folder` is no folder, or nothing in it is usable.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder", f"name a folder that holds {', '.join(SUFFIXES)} files")
    usable: list[Path] = []
    ignored = 0
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(root, name)
            if not name.startswith(".") and name.endswith(SUFFIXES) and path.is_file():
                usable.append(path)
            else:
                ignored += 1
    if not usable:
        raise UsageError(
            f"{folder} holds no text that can be read ({ignored} other files)",
            f"name a folder that holds {', '.join(SUFFIXES)} files",
        )
    return sorted(usable, key=lambda path: path.relative_to(folder).as_posix()), ignored


def local_texts(folder: Path, text_column: str = TEXT_COLUMN, counts: LocalCounts | None = None) -> Iterator[str]:
    """Yield every document below `folder`, one row of one file in memory at a time.

    Windows line ends become `\\n`. Bytes of a `.txt` file that are not UTF-8 come out as lone surrogates,
    which `write_corpus` replaces and counts.

    Args:
        text_column: the parquet column and JSON key that hold the text. A `.txt` file is one document.
        counts: filled while the texts are read.

    Raises:
        UsageError: no folder or no usable file.
        DataError: a damaged file, a line that is not a JSON object with such a text; names file and line.
    """
    counts = LocalCounts() if counts is None else counts
    paths, counts.ignored_files = find_text_files(folder)
    for path in paths:
        suffix = _suffix(path)
        counts.files[suffix] = counts.files.get(suffix, 0) + 1
        for text in _file_texts(path, suffix, text_column):
            if text is None:
                counts.null_rows += 1
            else:
                yield text.replace("\r\n", "\n")


def build_local_corpus(
    source_folder: Path,
    folder: Path,
    *,
    text_column: str = TEXT_COLUMN,
    rows_per_shard: int = 65_536,
    validation_rows: int = 10_000,
    seed: int = 0,
) -> dict[str, Any]:
    """Build a corpus at `folder` from the text files below `source_folder`.

    Its identity is the name and checksum of every file read: the same files give the same corpus on any
    machine, and a changed one is noticed.

    Args:
        validation_rows: distinct documents for validation; at most a tenth of all are taken.

    Returns:
        The manifest, whose `details` count the files by kind, the files ignored and the rows without text.

    Raises:
        UsageError: no usable file; the corpus would lie inside its own source; `folder` holds something else.
        DataError: a source file is damaged.
    """
    if folder.resolve().is_relative_to(source_folder.resolve()):
        raise UsageError(
            f"{folder} lies inside {source_folder}: the corpus would be read as part of its own source",
            "choose a folder outside of it",
        )
    paths, _ = find_text_files(source_folder)
    checksums = {path.relative_to(source_folder).as_posix(): sha256_file(path) for path in paths}
    counts = LocalCounts()
    return write_corpus(
        folder,
        local_texts(source_folder, text_column, counts),
        rows_per_shard=rows_per_shard,
        source={
            "name": "local",
            "text_column": text_column,
            "files": len(paths),
            "files_fingerprint": fingerprint(checksums),
        },
        validation_rows=validation_rows,
        seed=seed,
        details=vars(counts),
    )


def _suffix(path: Path) -> str:
    return next(suffix for suffix in SUFFIXES if path.name.endswith(suffix))


def _file_texts(path: Path, suffix: str, text_column: str) -> Iterator[str | None]:
    if suffix == ".parquet":
        yield from read_column(path, text_column, DAMAGED)
    elif suffix == ".txt":
        with _as_data_error(path):
            yield path.read_bytes().removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
    else:
        with _as_data_error(path), _open_lines(path, suffix) as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _line_text(line, f"{path}:{number}", text_column)


def _open_lines(path: Path, suffix: str) -> BinaryIO:
    if suffix == ".jsonl":
        return path.open("rb")
    # pyarrow's reader, unlike zstandard's, reports a stream that ends too early instead of ending with it.
    return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))


def _line_text(line: bytes, where: str, text_column: str) -> str | None:
    try:
        row = json.loads(line.removeprefix(b"\xef\xbb\xbf").decode())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({error})", DAMAGED) from None
    if not isinstance(row, dict):
        raise DataError(f"{where} holds a {type(row).__name__}, not a JSON object", DAMAGED)
    other_key = "say which key holds the text with --text-column NAME"
    if text_column not in row:
        raise DataError(f"{where} has no {text_column!r} (its keys: {', '.join(row) or 'none'})", other_key)
    text = row[text_column]
    if text is not None and not isinstance(text, str):
        raise DataError(f"{where}: {text_column!r} holds a {type(text).__name__}, not text", other_key)
    return text


@contextmanager
def _as_data_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error})", DAMAGED) from None

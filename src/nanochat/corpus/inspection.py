"""What is in a folder of data, whether it is still what its manifest says, and how it gets to another machine."""

import shlex
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nanochat.corpus.preparation import Watch
from nanochat.corpus.shards import COUNT_COLUMN, TEXT_COLUMN
from nanochat.errors import DataError, UsageError
from nanochat.files import (
    LEASE_MARK,
    LOCK_NAME,
    MANIFEST_NAME,
    TEMPORARY_MARK,
    Lease,
    leases,
    read_json,
    read_manifest,
    verify_files,
)

# Row groups, spread over all files, whose texts are measured.
MEASURED_GROUPS = 32
# Trainers that hand whole row groups to ranks leave some without any where a file has fewer groups than there are
# ranks, which then wait for each other for ever. Ours does not.
FEWEST_GROUPS = 8


@dataclass(frozen=True)
class Inspection:
    """What is in a folder of parquet files.

    Attributes:
        rows, bytes, groups: of each file, by name: rows, size, and the number of row groups.
        tokens: by the publishers' count, if all files have one.
        characters: lengths of a sample of the texts.
        samples: a few texts.
        manifest: None if there is none.
        leases: who reads it.
    """

    rows: dict[str, int]
    bytes: dict[str, int]
    groups: dict[str, int]
    tokens: int | None
    characters: np.ndarray[Any, np.dtype[np.int64]]
    samples: list[str]
    manifest: dict[str, Any] | None
    leases: list[Lease]


def inspect(folder: Path, num_samples: int = 3) -> Inspection:
    """Look into a folder. Reads the footers of all files, the counts of tokens, and MEASURED_GROUPS row groups of text.

    Raises:
        UsageError: there are no parquet files.
        DataError: a file is damaged, or has no text.
    """
    paths = sorted(path for path in folder.rglob("*.parquet") if not path.name.startswith("."))
    if not paths:
        raise UsageError(f"{folder} holds no .parquet files", "name a folder that does: nanochat data inspect FOLDER")
    rows, sizes, groups = {}, {}, {}
    tokens: int | None = 0
    where = [(path, group) for path in paths for group in range(_metadata(path).num_row_groups)]
    spread = np.linspace(0, len(where) - 1, min(MEASURED_GROUPS, len(where)))
    measured = {where[int(index)] for index in spread}
    lengths: list[np.ndarray[Any, np.dtype[np.int64]]] = []
    samples: list[str] = []
    for path in paths:
        name, metadata = path.relative_to(folder).as_posix(), _metadata(path)
        rows[name], sizes[name], groups[name] = metadata.num_rows, path.stat().st_size, metadata.num_row_groups
        try:
            with pq.ParquetFile(path) as parquet:
                has_count = COUNT_COLUMN in parquet.schema_arrow.names
                if tokens is not None and has_count:
                    tokens += pc.sum(parquet.read(columns=[COUNT_COLUMN])[COUNT_COLUMN]).as_py() or 0
                else:
                    tokens = None
                for group in range(metadata.num_row_groups):
                    if (path, group) in measured:
                        texts = parquet.read_row_group(group, columns=[TEXT_COLUMN])[TEXT_COLUMN].drop_null()
                        lengths.append(pc.utf8_length(texts).to_numpy().astype(np.int64))
                        if len(samples) < num_samples and len(texts):
                            samples.append(texts[0].as_py())
        except (pa.ArrowException, OSError, KeyError) as error:
            raise _damaged(path, error) from None
    manifest = read_json(folder / MANIFEST_NAME) if (folder / MANIFEST_NAME).exists() else None
    characters = np.concatenate(lengths) if lengths else np.zeros(0, np.int64)
    return Inspection(rows, sizes, groups, tokens, characters, samples, manifest, leases(folder))


def length_histogram(characters: np.ndarray[Any, np.dtype[np.int64]]) -> list[tuple[int, int]]:
    """Lower bounds, powers of two, and how many lengths lie from each to the next; without the empty ends."""
    powers = np.bincount(np.log2(np.maximum(characters, 1)).astype(int))
    first = int(np.argmax(powers > 0)) if len(powers) else 0
    return [(2**power, int(count)) for power, count in enumerate(powers)][first:]


def verify(folder: Path, workers: int, watch: Watch) -> tuple[dict[str, Any], dict[str, str]]:
    """Read every byte of a folder of any kind and compare it with the manifest.

    Args:
        workers: files read at once.
        watch: shown how far it is.

    Returns:
        The manifest, and what is wrong with each file that is missing, truncated or changed.

    Raises:
        UsageError: no workers.
        DataError: no manifest, or a damaged one.
    """
    if workers < 1:
        raise UsageError(f"{workers} workers cannot do anything", "use --workers 1 or more")
    fix = "make or copy the folder again"
    content = read_json(folder / MANIFEST_NAME, fix)
    manifest = read_manifest(folder, str(content.get("kind")) if isinstance(content, dict) else "", fix)

    def check(entry: dict[str, Any]) -> str:
        try:
            verify_files(folder, [entry], fix)
        except DataError as error:
            return error.what
        except OSError as error:
            return f"{folder / entry['name']} cannot be read ({error.strerror})"
        return ""

    damaged = {}
    with ThreadPoolExecutor(workers) as pool, watch("verifying", len(manifest["files"])) as progress:
        for entry, wrong in zip(manifest["files"], pool.map(check, manifest["files"])):
            progress.advance()
            if wrong:
                damaged[entry["name"]] = wrong
    return manifest, damaged


def made_again_by(folder: Path, manifest: dict[str, Any]) -> str:
    """The command line that makes a folder anew."""
    words = shlex.split(manifest["command"])
    return f"rm -r {shlex.quote(str(folder))} && {shlex.join(['nanochat', *words[1:]])}"


def transfer_commands(folder: Path, target: str) -> list[str]:
    """The command lines that bring a folder to another host and check it there.

    The manifest goes last and alone: without it the folder does not count as made, so an interrupted transfer cannot be
    taken for a whole one. rsync compares checksums, not dates, and keeps what came of a file when it is interrupted.

    Args:
        target: HOST:PATH, or USER@HOST:PATH.

    Raises:
        UsageError: `target` is not that.
        DataError: `folder` has no manifest.
    """
    host, colon, path = target.partition(":")
    if not colon or not host or not path or host.startswith("-") or "/" in host:
        raise UsageError(f"{target!r} does not name a folder on another host", "give HOST:PATH, or USER@HOST:PATH")
    read_json(folder / MANIFEST_NAME, "make the folder first, or give it a manifest: nanochat data adopt")
    # With --secluded-args the path is taken as it is, by all versions of rsync; it reaches ssh's shell never.
    rsync = ["rsync", "-rt", "--secluded-args", "--partial", "--checksum", "--info=progress2"]
    hidden = [f"--exclude={name}" for name in (f"{TEMPORARY_MARK}*", LOCK_NAME, f"{LEASE_MARK}*")]
    source, destination = f"{folder.resolve()}/", f"{host}:{path.rstrip('/') or '/'}/"
    return [
        shlex.join([*rsync, *hidden, f"--exclude=/{MANIFEST_NAME}", source, destination]),
        shlex.join([*rsync, f"{source}{MANIFEST_NAME}", destination]),
        shlex.join(["ssh", host, shlex.join(["nanochat", "data", "verify", path])]),
    ]


def _metadata(path: Path) -> pq.FileMetaData:
    try:
        return pq.read_metadata(path)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: BaseException) -> DataError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return DataError(f"{path} is damaged or no text ({reason})", "copy or download it again, or take it out")

"""Scored corpora with a fat column of embeddings, and what becomes of them."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.corpus.preparation import Watch
from nanochat.tracking.console import Console

SILENT: Watch = Console(enabled=False).progress
COLUMNS = ("text", "id", "token_count")


def write_fat_corpus(
    folder: Path, *, files: int = 3, rows: int = 300, group: int = 60, dimensions: int = 4, words: int = 12
) -> Path:
    """Write `data/CC-A/train-0000N-of-0000M.parquet` and a test file; some texts are null, empty or copies."""
    random = np.random.default_rng(7)
    vocabulary = np.array([f"word{number}" for number in range(2000)])
    for file in range(files):
        counts = random.integers(1, words, rows)
        texts: list[str | None] = [" ".join(random.choice(vocabulary, count)) for count in counts]
        texts[5::40] = ["a copy that stands in all files"] * len(texts[5::40])
        texts[7::50] = [None] * len(texts[7::50])
        texts[9::60] = [" \n"] * len(texts[9::60])
        scores = pa.array(np.round(random.random(rows) * 3, 1), mask=np.arange(rows) % 37 == 0)
        table = pa.table(
            {
                "text": texts,
                "id": [f"{file}-{row}" for row in range(rows)],
                "embedding": list(random.random((rows, dimensions), np.float32)),
                "token_count": pa.array(counts),
                "score": scores,
            }
        )
        write_rows(folder / "data" / "CC-A" / f"train-{file:05d}-of-{files:05d}.parquet", table, group)
    write_rows(folder / "data" / "CC-A" / "test-00000-of-00001.parquet", table.slice(0, 10), group)
    return folder


def write_rows(path: Path, table: pa.Table, group: int = 1000) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=group)


def source_rows(folder: Path) -> list[dict[str, Any]]:
    """All training rows of a fat corpus, in order."""
    paths = sorted(folder.rglob("train-*.parquet"))
    return [row for path in paths for row in pq.read_table(path, columns=[*COLUMNS, "score"]).to_pylist()]


def shard_rows(manifest: dict[str, Any], folder: Path, split: str) -> list[dict[str, Any]]:
    """All rows of one split of a corpus, in order."""
    names = [entry["name"] for entry in manifest["files"] if entry["split"] == split]
    return [row for name in names for row in pq.read_table(folder / name).to_pylist()]


def shard_bytes(folder: Path) -> dict[str, bytes]:
    """The content of every shard."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("shard_*.parquet"))}


# Says when the imports are done, so that a kill meets the work.
RUN = "import sys, nanochat.cli; import nanochat.corpus.ranking, nanochat.tracking.console, tyro; print(flush=True)"


def run_killed(arguments: list[str], delay: float | None) -> int:
    """Run a command in a process group of its own, which is killed after so many seconds of work."""
    command = [sys.executable, "-c", f"{RUN}; nanochat.cli.main(sys.argv[1:])", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
    assert process.stdout is not None
    process.stdout.readline()
    if delay is not None:
        time.sleep(delay)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.stdout.read()
    process.stdout.close()
    return process.wait()

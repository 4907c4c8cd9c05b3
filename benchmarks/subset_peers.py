"""One way to take a random 16.5 % of the text of fat parquet files, in a process of its own. Run by subset.py.

python benchmarks/subset_peers.py SIDE SOURCE OUTPUT
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

RATIO = 0.165
SEED = 42
COLUMNS = ["text", "token_count"]
ROWS_PER_SHARD = 14_000


def nothing(source: Path, output: Path) -> None:
    """The imports alone."""


def read(source: Path, output: Path) -> None:
    """Decode the wanted columns, write nothing."""
    for _ in tables(source):
        pass


def limit(source: Path, output: Path) -> None:
    """Decode, and write as many rows as a sample has: the first of each row group, without draw or filter."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    waiting: list[Any] = []
    writer = None
    for table in tables(source):
        waiting.append(table.slice(0, round(table.num_rows * RATIO)))
        if sum(part.num_rows for part in waiting) >= 1024:
            group = pa.concat_tables(waiting).combine_chunks()
            writer = writer or pq.ParquetWriter(
                output / "all.parquet", group.schema, compression="zstd", compression_level=3, use_dictionary=False
            )
            writer.write_table(group)
            waiting = []
    if waiting and writer:
        writer.write_table(pa.concat_tables(waiting))
    if writer:
        writer.close()


def tables(source: Path) -> Iterator[Any]:
    import pyarrow.parquet as pq

    for path in sorted(source.glob("*.parquet")):
        with pq.ParquetFile(path, pre_buffer=True) as parquet:
            for group in range(parquet.num_row_groups):
                yield parquet.read_row_group(group, columns=COLUMNS, use_threads=False)


def ours(source: Path, output: Path, workers: int = 1) -> None:
    """This project's command, as a user starts it."""
    from nanochat.cli import main

    flags = [f"--source={source}", f"--output={output / 'corpus'}", f"--ratio={RATIO}", f"--seed={SEED}"]
    main(["data", "subset", *flags, f"--rows-per-shard={ROWS_PER_SHARD}", f"--workers={workers}"])


def ours_2(source: Path, output: Path) -> None:
    """The same with two processes."""
    ours(source, output, workers=2)


def datasets_streaming(source: Path, output: Path) -> None:
    """Stream Arrow batches of the wanted columns and keep rows by a generator's draw."""
    import numpy as np
    from datasets import load_dataset

    rows = load_dataset("parquet", data_files=files(source), split="train", streaming=True, columns=COLUMNS)
    random = np.random.Generator(np.random.Philox(SEED))
    kept = rows.with_format("arrow").map(
        lambda table: table.filter(random.random(table.num_rows) < RATIO), batched=True, batch_size=1000
    )
    kept.to_parquet(str(output / "all.parquet"))


def datasets_loaded(source: Path, output: Path) -> None:
    """Load into its cache, shuffle the indices, select."""
    from datasets import load_dataset

    rows = load_dataset(
        "parquet", data_files=files(source), split="train", columns=COLUMNS, cache_dir=str(output / "cache")
    )
    rows.shuffle(seed=SEED).select(range(round(len(rows) * RATIO))).to_parquet(str(output / "all.parquet"))


def duckdb(source: Path, output: Path) -> None:
    """A Bernoulli sample, one thread."""
    import duckdb as database

    connection = database.connect(config={"threads": 1})
    connection.execute(
        f"COPY (SELECT text, token_count FROM '{source}/*.parquet' "
        f"USING SAMPLE {RATIO * 100} PERCENT (bernoulli, {SEED})) "
        f"TO '{output}/all.parquet' (FORMAT parquet, COMPRESSION zstd, COMPRESSION_LEVEL 3, ROW_GROUP_SIZE 2048)"
    )


def polars(source: Path, output: Path) -> None:
    """A lazy scan that keeps rows by a hash of their number, streamed to a file."""
    import polars as frames

    number = frames.col("number").hash(seed=SEED)
    (
        frames.scan_parquet(f"{source}/*.parquet")
        .select(COLUMNS)
        .with_row_index("number")
        .filter(number < int(RATIO * 2**64))
        .drop("number")
        .sink_parquet(output / "all.parquet", compression="zstd", compression_level=3, row_group_size=1024)
    )


def files(source: Path) -> list[str]:
    return [str(path) for path in sorted(source.glob("*.parquet"))]


SIDES: dict[str, Callable[[Path, Path], None]] = {
    side.__name__: side
    for side in (nothing, read, limit, ours, ours_2, duckdb, polars, datasets_streaming, datasets_loaded)
}

if __name__ == "__main__":
    SIDES[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
    sys.stdout.flush()
    # A stream of `datasets` that is not read to its end may hang when the interpreter closes (arrow #45214).
    if sys.argv[1] == "datasets_streaming":
        import os

        os._exit(0)

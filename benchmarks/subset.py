"""What it costs to take a random 16.5 % of a corpus with a fat embedding column, beside the limit and other tools, in
one run.

python benchmarks/subset.py [--source FOLDER] [--files N] [--rows N] [--repeats N] [--only SIDES]

Every side reads the same files and writes the same share of `text` and `token_count` with zstd at level 3, in a
process of its own, whose CPU time the system counts, start of Python included; memory is that of all its processes, as
seen every 20 ms. The limit decodes the two columns and writes as many rows without choosing any. Printed are a table
and, last, one line of JSON.

Peers that are not installed are skipped: pip install duckdb polars.
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from subset_peers import RATIO, SIDES

DIMENSIONS = 1024
ROW_GROUP_ROWS = 1000
WORDS = 50_000
MEAN_WORDS = 620
SAMPLE_SECONDS = 0.02


@dataclass(frozen=True)
class Cost:
    """What one way cost: medians of a few repeats."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int


def write_source(folder: Path, num_files: int, num_rows: int) -> None:
    """Files as the published corpora have them: text of Zipf-distributed words, and an embedding larger than it."""
    random = np.random.default_rng(7)
    lengths = random.integers(2, 10, WORDS)
    words = pa.array(["".join(map(chr, random.integers(97, 123, length))) for length in lengths])
    for index in range(num_files):
        schema = None
        path = folder / f"train-{index:05d}.parquet"
        groups = range(0, num_rows, ROW_GROUP_ROWS)
        writer = None
        for first in groups:
            rows = min(ROW_GROUP_ROWS, num_rows - first)
            counts = random.geometric(1 / MEAN_WORDS, rows)
            chosen = words.take(pa.array((random.zipf(1.3, counts.sum()) - 1) % WORDS))
            offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32())
            table = pa.table(
                {
                    "text": pc.binary_join(pa.ListArray.from_arrays(offsets, chosen), " "),
                    "id": [f"{index}-{row}" for row in range(first, first + rows)],
                    "embedding": pa.FixedSizeListArray.from_arrays(
                        pa.array(random.random(rows * DIMENSIONS, np.float32)), DIMENSIONS
                    ).cast(pa.list_(pa.float32())),
                    "token_count": counts,
                }
            )
            schema = schema or table.schema
            writer = writer or pq.ParquetWriter(path, schema)
            writer.write_table(table)
        if writer:
            writer.close()


def measure(side: str, source: Path, work: Path) -> Cost | str:
    """Run one side once; a text says why it could not."""
    output = work / "output"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    command = [sys.executable, str(Path(__file__).with_name("subset_peers.py")), side, str(source), str(output)]
    with (work / "errors").open("w+") as errors:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        peak_bytes = ended = 0
        while not ended:
            # Not ru_maxrss, in which a process begins with what its parent had when it was forked.
            peak_bytes = max(peak_bytes, resident_bytes(process.pid))
            time.sleep(SAMPLE_SECONDS)
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        seconds = time.perf_counter() - began
        # wait4 has reaped it; tell Popen.
        process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        lines = errors.read().strip().splitlines()
    if process.returncode:
        return lines[-1] if lines else f"exit code {process.returncode}"
    # The processes it started and waited for are in it.
    return Cost(seconds, usage.ru_utime + usage.ru_stime, peak_bytes)


def resident_bytes(pid: int) -> int:
    """What a process and all below it hold in memory."""
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="a folder of .parquet files; default: files made for this run")
    parser.add_argument("--files", type=int, default=4)
    parser.add_argument("--rows", type=int, default=50_000, help="per file")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default=",".join(SIDES), help=f"of {','.join(SIDES)}")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        source: Path = arguments.source or work / "source"
        if arguments.source is None:
            source.mkdir()
            write_source(source, arguments.files, arguments.rows)
        metadata = [pq.read_metadata(path) for path in sorted(source.glob("*.parquet"))]
        rows = sum(file.num_rows for file in metadata)
        raw = sum(
            pc.sum(pc.binary_length(pq.read_table(path, columns=["text"])["text"])).as_py()
            for path in source.glob("*.parquet")
        )
        results: dict[str, list[Cost | str]] = {side: [] for side in arguments.only.split(",")}
        # Round by round, so that a busy spell of the machine falls on all sides.
        for _ in range(arguments.repeats):
            for side, costs in results.items():
                if not costs or isinstance(costs[-1], Cost):
                    costs.append(measure(side, source, work))

    print(
        f"\n{platform.machine()}, {len(os.sched_getaffinity(0))} cores usable, pyarrow {pa.__version__}, load "
        f"{os.getloadavg()[0]:.1f}\n{rows:,} rows, {raw / 1e6:.0f} MB of text, {RATIO:.1%} kept; medians of "
        f"{arguments.repeats}\n"
    )
    print(f"{'':22}{'rows/s':>10}{'MB/s':>8}{'CPU s':>8}{'of limit':>10}{'peak MiB':>10}")
    medians = {side: median_of(costs) for side, costs in results.items()}
    limit = medians.get("limit")
    for side, cost in medians.items():
        if isinstance(cost, str):
            print(f"{side:22}skipped: {cost}")
            continue
        share = f"{cost.cpu_seconds / limit.cpu_seconds:10.2f}" if isinstance(limit, Cost) else f"{'':10}"
        speed = f"{rows / cost.seconds:10,.0f}{raw / cost.seconds / 1e6:8.0f}"
        print(f"{side:22}{speed}{cost.cpu_seconds:8.2f}{share}{cost.peak_bytes / 2**20:10.0f}")
    print(json.dumps({side: cost if isinstance(cost, str) else asdict(cost) for side, cost in medians.items()}))


def median_of(costs: list[Cost | str]) -> Cost | str:
    measured = [cost for cost in costs if isinstance(cost, Cost)]
    if len(measured) < len(costs):
        return next(cost for cost in costs if isinstance(cost, str))
    return Cost(
        statistics.median(cost.seconds for cost in measured),
        statistics.median(cost.cpu_seconds for cost in measured),
        round(statistics.median(cost.peak_bytes for cost in measured)),
    )


if __name__ == "__main__":
    main()

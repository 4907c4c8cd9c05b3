"""How fast batches are made, beside a memory copy, the raw tokenizer and karpathy/nanochat's loader, in one
run.

python benchmarks/loader.py [--peer CHECKOUT] [--corpus FOLDER] [--threads N]

All sides read the same text with the same vocabulary and deliver int64 inputs and targets on the CPU. Ours reads token
shards, made once, beforehand (that is `tokenise once` below); the peer tokenises while it trains. Both have the same
number of threads to copy tensors with.
Printed are a table and, last, one line of JSON.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanochat.corpus.builtin import build_builtin_corpus
from nanochat.corpus.shards import open_corpus, read_texts
from nanochat.identity import usable_cores
from nanochat.loader.batches import BatchLoader, LoaderConfig
from nanochat.loader.order import ShuffledOrder
from nanochat.loader.packing import Lane, Remainders
from nanochat.loader.token_shards import TokenDataset
from nanochat.loader.tokenize import tokenize_corpus
from nanochat.tokenizer.tokenizer import Tokenizer
from nanochat.tokenizer.train import train_tokenizer

ROWS = 32
SEQUENCE_LEN = 2048
LANES = 64
POOL_SIZE = 256
REPEATS = 5
WARM_UP_BATCHES = 20


@dataclass(frozen=True)
class Rate:
    """Tokens per second on the clock, and per second of CPU time, which a busy machine disturbs less."""

    rate: float
    cpu_rate: float


def rate_of(work: Callable[[], int], repeats: int = REPEATS) -> Rate:
    """The rate of `work`, which returns the tokens it handled: medians of a few repeats."""
    rates, cpu_rates = [], []
    for _ in range(repeats):
        began, cpu_began = time.perf_counter(), time.process_time()
        tokens = work()
        rates.append(tokens / (time.perf_counter() - began))
        cpu_rates.append(tokens / (time.process_time() - cpu_began))
    return Rate(statistics.median(rates), statistics.median(cpu_rates))


def loader_rate(dataset: TokenDataset, num_batches: int) -> Rate:
    config = LoaderConfig(SEQUENCE_LEN, ROWS, seed=1, lanes=LANES, pool_size=POOL_SIZE)
    with BatchLoader(dataset, config, device_batch_size=ROWS) as loader:

        def deliver(count: int) -> int:
            return sum(inputs.numel() for _ in range(count) for inputs, _ in loader.next_step())

        deliver(WARM_UP_BATCHES)
        return rate_of(lambda: deliver(num_batches))


def copy_rate(dataset: TokenDataset, num_batches: int) -> Rate:
    """The limit: uint16 rows that lie ready in memory, copied to int64 inputs and targets, no more."""
    rows_BT1 = torch.randint(dataset.vocab_size, (ROWS, SEQUENCE_LEN + 1)).to(torch.uint16)

    def copy() -> int:
        return sum(
            min(rows_BT1[:, :-1].to(torch.int64).numel(), rows_BT1[:, 1:].to(torch.int64).numel())
            for _ in range(num_batches)
        )

    copy()
    return rate_of(copy)


def encode_rate(tokenizer: Tokenizer, corpus: Path) -> Rate:
    texts = list(islice(read_texts(corpus, "train", "check --corpus"), 1500))
    return rate_of(lambda: sum(len(tokenizer.encode(text)) for text in texts))


def crop_fraction(dataset: TokenDataset, remainders: Remainders) -> tuple[float, float]:
    """Cropped and added-BOS shares of one whole epoch of all lanes: plans only, no tokens are copied."""
    cropped = added = delivered = 0
    for index in range(LANES):
        lane = Lane(
            ShuffledOrder(dataset.num_documents, 1, index, LANES),
            dataset.lengths_of,
            row_size=SEQUENCE_LEN + 1,
            pool_size=POOL_SIZE,
            remainders=remainders,
        )
        while lane.state().epoch == 0:
            lane.next_row()
        counts = lane.state().counts
        cropped += counts.cropped
        added += counts.added_bos
        delivered += counts.rows * (SEQUENCE_LEN + 1)
    return cropped / (cropped + delivered - added), added / delivered


def peer_side(
    checkout: Path | None, corpus: Path, tokenizer: Path, work: Path, num_documents: int, num_batches: int
) -> dict[str, Any] | str:
    """The peer's figures, or why there are none."""
    if checkout is None:
        return "no --peer checkout given"
    if not (checkout / "nanochat" / "dataloader.py").is_file():
        return f"{checkout} is not a checkout of karpathy/nanochat"
    data = work / "peer" / "base_data_climbmix"
    data.mkdir(parents=True)
    for shard in corpus.glob("shard_*.parquet"):
        (data / shard.name).symlink_to(shard.resolve())
    script = Path(__file__).with_name("loader_peer.py")
    numbers = map(str, (ROWS, SEQUENCE_LEN, num_documents, num_batches, REPEATS))
    finished = subprocess.run(
        [sys.executable, script, tokenizer, *numbers],
        env={
            **os.environ,
            "PYTHONPATH": str(checkout),
            "NANOCHAT_BASE_DIR": str(work / "peer"),
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
        },
        capture_output=True,
        text=True,
    )
    if finished.returncode != 0:
        reason = (finished.stderr.strip().splitlines() or ["no message"])[-1]
        return f"it failed: {reason}"
    result: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, help="parquet shards with a manifest; default: the built-in corpus")
    parser.add_argument("--peer", type=Path, help="a checkout of karpathy/nanochat")
    parser.add_argument("--vocab-size", type=int, default=32_768)
    parser.add_argument("--threads", type=int, default=usable_cores(), help="OpenMP's, of both sides")
    parser.add_argument("--batches", type=int, default=200, help="batches per repeat, ours")
    parser.add_argument("--peer-batches", type=int, default=20, help="batches per repeat, the peer's")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        corpus: Path = arguments.corpus or work / "base_data"
        if arguments.corpus is None:
            build_builtin_corpus(corpus)
        opened = open_corpus(corpus, "check --corpus")
        train_texts = read_texts(corpus, "train", "check --corpus")
        tokenizer = train_tokenizer(train_texts, vocab_size=arguments.vocab_size, max_chars=200_000_000)
        tokenizer.save(work / "tokenizer")

        def tokenize() -> int:
            totals = tokenize_corpus(corpus, work / "tokenizer", work / "tokens", workers=1)["totals"]
            return int(sum(split["tokens"] for split in totals.values()))

        once = rate_of(tokenize, repeats=1)
        dataset = TokenDataset.open(work / "tokens", "train")
        ours = loader_rate(dataset, arguments.batches)
        copy = copy_rate(dataset, arguments.batches)
        encode = encode_rate(tokenizer, corpus)
        keep, bos = crop_fraction(dataset, "keep")
        drop, _ = crop_fraction(dataset, "drop")
        peer = peer_side(arguments.peer, corpus, work / "tokenizer", work, opened.train_rows, arguments.peer_batches)

    print(
        f"\n{platform.machine()}, {usable_cores()} cores usable, torch {torch.__version__} with"
        f" {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}"
    )
    print(
        f"{dataset.num_documents:,} documents, {dataset.num_tokens:,} tokens (per document median"
        f" {np.median(dataset.lengths):.0f}, mean {dataset.lengths.mean():.0f}), vocabulary"
        f" {tokenizer.vocab_size:,}, B = {ROWS}, T = {SEQUENCE_LEN}; medians of {REPEATS}\n"
    )
    print(f"{'':34}{'M tokens/s':>12}{'per CPU-s':>12}{'cropped':>10}")
    print_row("memory copy (limit)", copy)
    print_row("this loader", ours, keep)
    print_row("this loader, remainders=drop", None, drop)
    print_row("tokenise once, one core", once)
    print_row("raw tiktoken, one core", encode)
    if isinstance(peer, dict):
        peer_rate = Rate(peer["rate"], peer["cpu_rate"])
        print_row("karpathy/nanochat's loader", peer_rate, peer["crop_fraction"])
        faster, cheaper = ours.rate / peer_rate.rate, ours.cpu_rate / peer_rate.cpu_rate
        print(f"\nThis loader is {faster:.0f} times as fast as the peer's, at 1/{cheaper:.0f} of its CPU time.")
    else:
        print(f"{'karpathy/nanochat':34}skipped: {peer}")
    rates = {"copy": copy, "loader": ours, "tokenize_once": once, "encode": encode}
    waste = {"crop_keep": keep, "crop_drop": drop, "added_bos": bos}
    print(json.dumps({**{name: asdict(rate) for name, rate in rates.items()}, **waste, "peer": peer}))


def print_row(label: str, rate: Rate | None, cropped: float | None = None) -> None:
    speed = f"{rate.rate / 1e6:12.2f}{rate.cpu_rate / 1e6:12.2f}" if rate else f"{'':24}"
    print(f"{label:34}{speed}" + (f"{cropped:10.2%}" if cropped is not None else ""))


if __name__ == "__main__":
    main()

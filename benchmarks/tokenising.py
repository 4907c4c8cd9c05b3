"""How fast text becomes token ids: tiktoken, ours with and without fastokens, and the whole stage, in one run.

python benchmarks/tokenising.py [--corpus FOLDER] [--copies N] [--vocab-size N] [--documents N] [--repeats N]

All sides encode the same documents with the same vocabulary. The whole stage also reads and checks parquet shards and
writes token shards, with one and two processes, timed as a whole command; its text is the corpus --copies times over,
to be long beside the start of Python. Printed are a table and, last, one line of JSON.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from unittest import mock

import tiktoken

from nanochat.corpus.builtin import build_builtin_corpus
from nanochat.corpus.shards import adopt, read_texts
from nanochat.files import MANIFEST_NAME
from nanochat.identity import usable_cores
from nanochat.loader.tokenize import TEXTS_PER_BATCH, tokenize_corpus
from nanochat.tokenizer.bulk import BulkEncoder, load_fast
from nanochat.tokenizer.tokenizer import Tokenizer
from nanochat.tokenizer.train import train_tokenizer
from nanochat.workspace import Workspace

FIX = "check --corpus"


def cpu_seconds() -> float:
    """Of this process and of those it has started and seen the end of."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def measure(sides: dict[str, Callable[[], object]], repeats: int) -> dict[str, tuple[float, float]]:
    """Median seconds on the clock and of CPU time of each side; they take turns, so that a busy minute is shared."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, work in sides.items():
            began, cpu_began = time.perf_counter(), cpu_seconds()
            work()
            seconds[name].append((time.perf_counter() - began, cpu_seconds() - cpu_began))
    return {
        name: (statistics.median(clock for clock, _ in taken), statistics.median(cpu for _, cpu in taken))
        for name, taken in seconds.items()
    }


def tiktoken_sides(tokenizer: Tokenizer, documents: list[str]) -> dict[str, Callable[[], object]]:
    ranks = {token: rank for rank, token in enumerate(tokenizer.mergeable_tokens)}
    encoding = tiktoken.Encoding(
        "peer", pat_str=tokenizer.pattern, mergeable_ranks=ranks, special_tokens=tokenizer.special_ids
    )
    return {
        "tiktoken, a loop": lambda: [encoding.encode_ordinary(text) for text in documents],
        "tiktoken, its batch call, 1 thread": lambda: encoding.encode_ordinary_batch(documents, num_threads=1),
    }


def our_sides(tokenizer: Tokenizer, documents: list[str]) -> dict[str, Callable[[], object]]:
    batches = [documents[start : start + TEXTS_PER_BATCH] for start in range(0, len(documents), TEXTS_PER_BATCH)]
    sides: dict[str, Callable[[], object]] = {}
    with_fast, without = BulkEncoder(tokenizer), BulkEncoder(tokenizer)
    with mock.patch.dict(sys.modules, fastokens=None):
        without.encode(documents[:1])
    sides["ours, without fastokens"] = lambda: [without.encode(batch) for batch in batches]
    if load_fast(tokenizer) is not None:
        with_fast.encode(documents[:1])
        sides["ours, with fastokens"] = lambda: [with_fast.encode(batch) for batch in batches]
    return sides


def stage_side(workspace: Workspace, workers: int) -> Callable[[], object]:
    """The command as a process of its own, as the CPU time of its workers is known when it has ended."""
    command = [sys.executable, "-m", "nanochat", "data", "tokenize", "--workers", str(workers)]
    environment = {**os.environ, "NANOCHAT_BASE_DIR": str(workspace.root)}

    def run() -> None:
        shutil.rmtree(workspace.tokens, ignore_errors=True)
        subprocess.run(command, env=environment, check=True, capture_output=True)

    return run


def multiply(corpus: Path, copies: int) -> None:
    """Have the shards of a corpus to train on so many times, under as many names."""
    *train, val = sorted(corpus.glob("shard_*.parquet"))
    (corpus / MANIFEST_NAME).unlink()
    val.rename(corpus / f"shard_{len(train) * copies:05}.parquet")
    for copy in range(1, copies):
        for place, shard in enumerate(train):
            (corpus / f"shard_{len(train) * copy + place:05}.parquet").hardlink_to(shard)
    adopt(corpus)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, help="parquet shards with a manifest; default: the built-in corpus")
    parser.add_argument("--copies", type=int, default=1, help="of the built-in corpus, for the whole stage")
    parser.add_argument("--vocab-size", type=int, default=32_768)
    parser.add_argument("--documents", type=int, default=20_000, help="at most; the whole stage takes all")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.copies > 1 and arguments.corpus is not None:
        parser.error("--copies are of the built-in corpus, not of --corpus")

    with tempfile.TemporaryDirectory() as name:
        workspace = Workspace(Path(name))
        corpus = workspace.base_data
        if arguments.corpus is None:
            build_builtin_corpus(corpus)
        else:
            corpus.symlink_to(arguments.corpus.resolve())
        train_texts = read_texts(corpus, "train", FIX)
        tokenizer = train_tokenizer(train_texts, vocab_size=arguments.vocab_size, max_chars=200_000_000)
        tokenizer.save(workspace.tokenizer)
        documents = list(islice(read_texts(corpus, "train", FIX), arguments.documents))
        num_tokens = sum(len(tokenizer.encode(text)) for text in documents)
        if arguments.copies > 1:
            multiply(corpus, arguments.copies)
        totals = tokenize_corpus(corpus, workspace.tokenizer, workspace.tokens, workers=1)["totals"]
        stage_tokens = sum(split["tokens"] for split in totals.values())

        encoders = {**tiktoken_sides(tokenizer, documents), **our_sides(tokenizer, documents)}
        stages = {f"data tokenize --workers {workers}": stage_side(workspace, workers) for workers in (1, 2)}
        taken = measure({**encoders, **stages}, arguments.repeats)

    packages = ", ".join(f"{package} {version(package)}" for package in ("tiktoken", "numpy"))
    fast = f"fastokens {version('fastokens')}" if "ours, with fastokens" in encoders else "without fastokens"
    print(f"\n{platform.machine()}, {usable_cores()} cores usable, {packages}, {fast}, load {os.getloadavg()[0]:.1f}")
    print(
        f"{len(documents):,} documents, {num_tokens:,} tokens; the whole stage {stage_tokens:,} tokens; vocabulary"
        f" {tokenizer.vocab_size:,}; medians of {arguments.repeats}\n"
    )
    print(f"{'':40}{'M tokens/s':>12}{'per CPU-s':>12}{'× the loop':>12}")
    tokens = {name: stage_tokens if name in stages else num_tokens for name in taken}
    rates = {name: (tokens[name] / clock, tokens[name] / cpu) for name, (clock, cpu) in taken.items()}
    loop = rates["tiktoken, a loop"][1]
    for name, (rate, cpu_rate) in rates.items():
        print(f"{name:40}{rate / 1e6:12.2f}{cpu_rate / 1e6:12.2f}{cpu_rate / loop:12.2f}")
    print(json.dumps({name: {"rate": rate, "cpu_rate": cpu_rate} for name, (rate, cpu_rate) in rates.items()}))


if __name__ == "__main__":
    main()

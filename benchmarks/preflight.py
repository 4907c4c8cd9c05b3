"""How long `nanochat preflight` takes of a run with many shards, its start included: a person waits for it.

    python benchmarks/preflight.py [--shards 1000] [--repeat 5]

It makes a corpus of that many small shards and their tokens, then times the command from its start to its last line,
beside what `nanochat --version` takes: what is left is the checking. Sizes of shards do not matter, as none is read.
On a cluster, name a folder on the file system that the run will use, whose metadata server is what is waited for.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from nanochat.corpus.shards import write_corpus
from nanochat.loader.tokenize import tokenize_corpus
from nanochat.tokenizer.train import train_tokenizer
from nanochat.workspace import Workspace

FLAGS = ("--run", "benchmark", "--stages", "tokenizer,tokenize,base,mid,sft,eval,report", "--depth", "4")
TASKS = ("--mid.tasks", "arithmetic", "--sft.tasks", "identity")
TOKENS = ("--run", "benchmark", "--stages", "base", "--depth", "4")


def make(workspace: Workspace, shards: int) -> None:
    """A corpus of so many shards of one document, its tokenizer and its tokens."""
    texts = [f"Document {number} says that {number} and {number} are {2 * number}." for number in range(shards)]
    write_corpus(workspace.base_data, texts, rows_per_shard=1, source={"name": "benchmark"}, validation_rows=1)
    train_tokenizer(texts, vocab_size=300, max_chars=10**6).save(workspace.tokenizer)
    tokenize_corpus(workspace.base_data, workspace.tokenizer, workspace.tokens)


def seconds(arguments: tuple[str, ...], workspace: Workspace) -> float:
    """How long one command takes, which must succeed."""
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "nanochat", *arguments],
        env={**os.environ, "NANOCHAT_BASE_DIR": str(workspace.root)},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return time.perf_counter() - started


def main() -> None:
    """Make the shards, time the commands in turn, print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=1000, help="of text; tokens have two files for each")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to make them; default: a temporary folder")
    options = parser.parse_args()
    commands = {
        "nanochat --version": ("--version",),
        "nanochat preflight, all stages from the text on": ("preflight", *FLAGS, *TASKS),
        "nanochat preflight --stages base": ("preflight", *TOKENS),
    }
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        workspace = Workspace(Path(folder))
        make(workspace, options.shards)
        taken: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(options.repeat):
            for name, arguments in commands.items():
                taken[name].append(seconds(arguments, workspace))
    print(f"{options.shards} shards, median of {options.repeat}:")
    for name, times in taken.items():
        print(f"{statistics.median(times):6.2f} s  {name}")


if __name__ == "__main__":
    main()

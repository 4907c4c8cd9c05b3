"""How long until something happens: help, imports, and the first step of training with a cold and a warm compiler.

    python benchmarks/startup.py [--depth 4] [--compile]

Every figure is of a process of its own, from its start; the bare interpreter and `import torch` are the limits. Without
--compile the first step is one of eager training, which is the default on a CPU.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from nanochat.corpus.builtin import build_builtin_corpus
from nanochat.corpus.shards import read_texts
from nanochat.loader.tokenize import tokenize_corpus
from nanochat.tokenizer.train import train_tokenizer
from nanochat.workspace import Workspace


def seconds_to(marker: str | None, *command: str, **environment: str) -> float:
    """Seconds from the start of Python to the first line with `marker`, or to its end."""
    began = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *command],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        lines = []
        found = None
        for line in process.stdout or ():
            lines.append(line)
            if marker is not None and marker in line and found is None:
                found = time.perf_counter() - began
    if process.returncode or (marker is not None and found is None):
        sys.exit(f"startup: {' '.join(command)} failed:\n{''.join(lines[-10:])}")
    return found if found is not None else time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--sequence-len", type=int, default=256)
    parser.add_argument("--device-batch-size", type=int, default=16)
    parser.add_argument("--compile", action="store_true", help="compile, with an empty cache and then with a full one")
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    programs = {
        "python -c pass": ("-c", "pass"),
        "python -c 'import torch'": ("-c", "import torch"),
        "nanochat --help": ("-m", "nanochat", "--help"),
        "nanochat train base --help": ("-m", "nanochat", "train", "base", "--help"),
    }
    result = {
        name: statistics.median(seconds_to(None, *command) for _ in range(asked.repeats))
        for name, command in programs.items()
    }
    with tempfile.TemporaryDirectory() as name:
        workspace = Workspace(Path(name))
        build_builtin_corpus(workspace.base_data)
        texts = read_texts(workspace.base_data, "train", "run the benchmark again")
        train_tokenizer(texts, vocab_size=4096, max_chars=20_000_000).save(workspace.tokenizer)
        tokenize_corpus(workspace.base_data, workspace.tokenizer, workspace.tokens)
        for state in ("cold", "warm") if asked.compile else ("eager",):
            rows = asked.device_batch_size
            flags = {
                "depth": asked.depth,
                "sequence-len": asked.sequence_len,
                "device-batch-size": rows,
                "total-batch-size": rows * asked.sequence_len,
                "num-steps": 2,
                "log-every": 1,
                "run": state,
                "model-tag": state,
                "compile": "on" if asked.compile else "off",
                "wandb": "disabled",
                "eval-tokens": asked.sequence_len,
                "eval-every": 0,
                "save-every": 0,
            }
            command = ("-m", "nanochat", "train", "base", *(f"--{key}={value}" for key, value in flags.items()))
            result[f"first step, {state}"] = seconds_to("step 1/2", *command, NANOCHAT_BASE_DIR=name)
    for label, seconds in result.items():
        print(f"{label:<30}{seconds:8.2f} s")
    print(json.dumps(result))


if __name__ == "__main__":
    main()

"""What it costs to look at every step's loss before the next step is queued.

    python benchmarks/host_sync.py [--device cuda --depth 12 --sequence-len 2048 --device-batch-size 32] [--steps 60]

The same run, reading the results of each step at once and one step late, in turns in one process: the median seconds of
a step. On a CPU, where a step is done when it is queued, both are the same but for noise, and what is told of single
steps that are read late is wrong: there it only proves that the script runs.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from nanochat.config import TrainBaseConfig
from nanochat.corpus.builtin import build_builtin_corpus
from nanochat.corpus.shards import read_texts
from nanochat.loader.tokenize import tokenize_corpus
from nanochat.runtime import start_runtime
from nanochat.tokenizer.train import train_tokenizer
from nanochat.tracking import keys
from nanochat.tracking.metrics import read
from nanochat.training import loop
from nanochat.training.base import train_base
from nanochat.training.session import metrics_path
from nanochat.workspace import Workspace

# Compilation, and the first allocations.
WARM_UP_STEPS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--sequence-len", type=int, default=256)
    parser.add_argument("--device-batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    seconds: dict[int, list[float]] = {0: [], 1: []}
    with tempfile.TemporaryDirectory() as name, start_runtime(asked.device) as runtime:
        workspace = Workspace(Path(name))
        build_builtin_corpus(workspace.base_data)
        texts = read_texts(workspace.base_data, "train", "run the benchmark again")
        train_tokenizer(texts, vocab_size=4096, max_chars=20_000_000).save(workspace.tokenizer)
        tokenize_corpus(workspace.base_data, workspace.tokenizer, workspace.tokens)
        for repeat in range(asked.repeats):
            for steps_ahead, found in seconds.items():
                run = f"{steps_ahead}-ahead-{repeat}"
                config = TrainBaseConfig(
                    depth=asked.depth,
                    sequence_len=asked.sequence_len,
                    device_batch_size=asked.device_batch_size,
                    total_batch_size=asked.device_batch_size * asked.sequence_len,
                    num_steps=asked.steps,
                    model_tag=run,
                    log_every=1,
                    eval_tokens=asked.sequence_len * asked.device_batch_size,
                    eval_every=0,
                    sample_every=0,
                    save_every=0,
                    wandb="disabled",
                )
                loop.STEPS_AHEAD[runtime.device.type] = steps_ahead
                train_base(config, run, workspace, runtime)
                rows = read(metrics_path(workspace, run, "base", run))
                # The last is read at once in either case.
                found += [row[keys.STEP_SECONDS] for row in rows if WARM_UP_STEPS < row["step"] < asked.steps]
    medians = {f"{steps_ahead} ahead": statistics.median(found) for steps_ahead, found in seconds.items()}
    for label, median in medians.items():
        print(f"{label:<12}{median * 1e3:10.2f} ms per step")
    print(json.dumps(medians))


if __name__ == "__main__":
    main()

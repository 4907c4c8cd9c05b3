"""How long training stands still for a checkpoint, beside what the disk alone needs for as many bytes, in one run.

    python benchmarks/checkpoint.py [--depth 12] [--folder WHERE]

Saves a model of a depth and its optimizer state, some times over, as training does, and loads the newest as a resume
does, with every byte checked. The limit is one file of zeros of the same size, written and flushed. With --step-seconds
and --save-every it also says which share of the wall clock the saves take.
"""

import argparse
import hashlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from nanochat.checkpoint.store import load_newest, save_checkpoint
from nanochat.config import model_from_depth
from nanochat.files import sync_file
from nanochat.model.gpt import GPT


def seconds_of(work: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def write_zeros(path: Path, num_bytes: int) -> None:
    block = bytes(2**24)
    with path.open("wb") as file:
        for start in range(0, num_bytes, len(block)):
            file.write(block[: num_bytes - start])
    sync_file(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--vocab-size", type=int, default=32768)
    parser.add_argument("--folder", type=Path, help="where to write; default: where temporary files go")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--save-every", type=int, default=250, help="steps between checkpoints")
    parser.add_argument("--step-seconds", type=float, help="what a step takes, to tell the share of the saves")
    asked = parser.parse_args()
    torch.manual_seed(0)
    model = GPT(model_from_depth(asked.depth, asked.vocab_size, 2048))
    model.init_weights()
    weights = model.state_dict()
    # Momentum and second moments, about as much as the optimizers keep: AdamW two for each weight, Muon one and a bit.
    optimizer = {f"{name}.{kind}": torch.randn_like(weight) for name, weight in weights.items() for kind in ("m", "v")}
    num_bytes = sum(tensor.nbytes for tensors in (weights, optimizer) for tensor in tensors.values())
    with tempfile.TemporaryDirectory(dir=asked.folder) as name:
        folder, steps = Path(name), iter(range(10**6))

        def save() -> None:
            save_checkpoint(
                folder / "checkpoints", next(steps), model=weights, optimizer=optimizer, state={}, config={}, keep=2
            )

        save_seconds = seconds_of(save, asked.repeats)
        load_seconds = seconds_of(lambda: load_newest(folder / "checkpoints", "run it again"), asked.repeats)
        limit_seconds = seconds_of(lambda: write_zeros(folder / "zeros", num_bytes), asked.repeats)
    payload = os.urandom(2**24)
    hash_seconds = seconds_of(lambda: hashlib.sha256(payload).digest(), asked.repeats) * num_bytes / len(payload)
    result = {
        "depth": asked.depth,
        "bytes": num_bytes,
        "save_seconds": save_seconds,
        "load_seconds": load_seconds,
        "disk_alone_seconds": limit_seconds,
        "checksum_alone_seconds": hash_seconds,
    }
    print(f"d{asked.depth}: {num_bytes / 1e9:.2f} GB of weights and optimizer state")
    print(f"save {save_seconds:.2f} s, load {load_seconds:.2f} s")
    print(f"the disk alone {limit_seconds:.2f} s, SHA-256 alone {hash_seconds:.2f} s")
    if asked.step_seconds:
        share = save_seconds / (save_seconds + asked.save_every * asked.step_seconds)
        result["share"] = share
        print(f"a save every {asked.save_every} steps of {asked.step_seconds} s: {share:.2%} of the wall clock")
    print(json.dumps(result))


if __name__ == "__main__":
    main()

"""An experiment small enough to run in seconds: the same sentences in two arms, one of them full of noise."""

import random
from collections.abc import Iterator
from pathlib import Path

from nanochat.config import MachineConfig
from nanochat.corpus.shards import write_corpus
from nanochat.experiment.prepare import prepare
from nanochat.experiment.specification import Experiment, ExperimentFolder, read_experiment
from nanochat.tracking.console import Console
from nanochat.workspace import Workspace

QUIET = Console(enabled=False)
MACHINE = MachineConfig(device="cpu", dtype="float32", wandb="disabled")

TOP = """
name = "toy"
seeds = [1, 2]
"""
SETTINGS = """
[settings]
depth = 1
aspect_ratio = 32
head_dim = 32
sequence_len = 32
lanes = 4
pool_size = 8
total_batch_size = 256
device_batch_size = 8
scale_hyperparameters = false
weight_decay = 0.0
warmup_steps = 1
eval_every = 10
eval_tokens = 1024
save_every = 10
log_every = 2

[tokenizer]
vocab_size = 300

[validation]
tokens = 1024
"""
ARMS = """
[arms.clean]
data = "clean"

[arms.noisy]
data = "noisy"
"""


def sentences(noise: float, count: int, seed: int = 0) -> Iterator[str]:
    """Documents of small sums, of which a share is replaced by random letters."""
    draw = random.Random(seed)
    for _ in range(count):
        sums = [f"{number} plus {number % 7} is {number + number % 7}." for number in draw.sample(range(900), 4)]
        noisy = ["".join(draw.choices("qwxyz ", k=len(text))) if draw.random() < noise else text for text in sums]
        yield " ".join(noisy)


def write_arms(folder: Path, clean: int = 200, noisy: int = 320) -> None:
    """The corpora of both arms: the noisy one is larger, so the clean one sets the budget."""
    for name, noise, count in (("clean", 0.0, clean), ("noisy", 0.6, noisy)):
        write_corpus(
            folder / name,
            sentences(noise, count, seed=len(name) + count),
            rows_per_shard=128,
            source={"name": name, "count": count},
            validation_rows=40,
        )


def write_file(folder: Path, top: str = TOP, settings: str = SETTINGS, arms: str = ARMS) -> Path:
    """The experiment's file."""
    file = folder / "experiment.toml"
    file.write_text(top + settings + arms)
    return file


def prepared_experiment(folder: Path, **parts: str) -> tuple[Experiment, ExperimentFolder]:
    """An experiment with corpora, file and preparation, in a workspace below the folder."""
    write_arms(folder)
    experiment = read_experiment(write_file(folder, **parts))
    places = ExperimentFolder.of(experiment, Workspace(folder / "workspace"))
    prepare(experiment, places, QUIET, workers=1)
    return experiment, places

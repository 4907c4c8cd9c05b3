"""While a model trains, nobody rewrites what it reads."""

import threading
import time
from pathlib import Path

import pytest
import torch

from nanochat.config import TrainBaseConfig
from nanochat.files import leases
from nanochat.runtime import Runtime
from nanochat.training.base import train_base
from nanochat.workspace import Workspace

CONFIG = TrainBaseConfig(
    depth=2,
    aspect_ratio=16,
    head_dim=16,
    sequence_len=32,
    num_steps=2,
    total_batch_size=16 * 32,
    device_batch_size=16,
    lanes=12,
    pool_size=8,
    scale_hyperparameters=False,
    dtype="float32",
    wandb="disabled",
)


def collect_leases(folder: Path, found: set[str], ended: threading.Event) -> None:
    while not ended.is_set():
        found.update(lease.what for lease in leases(folder))
        time.sleep(0.001)


@pytest.mark.parametrize("name", ["tokens", "tokenizer"])
def test_training_says_what_it_reads_until_it_ends(prepared_workspace: Workspace, name: str) -> None:
    folder = prepared_workspace.root / name
    found: set[str] = set()
    ended = threading.Event()
    watcher = threading.Thread(target=collect_leases, args=(folder, found, ended))
    watcher.start()
    try:
        train_base(CONFIG, "leased", prepared_workspace, Runtime(torch.device("cpu"), torch.float32))
    finally:
        ended.set()
        watcher.join()
    assert found == {f"the training of the base model {CONFIG.tag}, run leased"}
    assert leases(folder) == []

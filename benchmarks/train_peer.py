"""The peer's side of `train.py`: karpathy/nanochat's own `scripts.base_train`, with three things replaced.

Started by `train.py` in a process whose `nanochat` is the checkout. Where the script evaluates, it scores the
rows it was handed instead of its own, by the sums of `nanochat.evaluation.bits_per_byte`; where it would save a
checkpoint, it does nothing; where it would fetch attention kernels, it gets those of `peer_attention.py`. Model,
optimizer, schedules, loader and torch.compile are the peer's, untouched.
"""

import importlib
import math
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import peer_attention


def make_scorer(folder: Path, device_batch_size: int) -> Callable[..., float]:
    """What stands in for the peer's `evaluate_bpb`: bits per byte of the rows in `folder`."""
    rows_NT = torch.from_numpy(np.load(folder / "rows.npy").astype(np.int64))
    bytes_of_token = torch.from_numpy(np.load(folder / "token_bytes.npy").astype(np.float64))
    calls = 0

    @torch.no_grad()
    def score(model: Any, *_: Any) -> float:
        nonlocal calls
        calls += 1
        if calls == 1:
            # The script also evaluates before the first step, which nobody asked for here.
            return math.nan
        # Uncompiled, so that no time goes into compiling a second graph.
        eager = model._orig_mod
        device = next(eager.parameters()).device
        nats = num_bytes = 0.0
        for rows_BT1 in torch.split(rows_NT.to(device), device_batch_size):
            targets_BT = rows_BT1[:, 1:].contiguous()
            weights_BT = bytes_of_token.to(device)[targets_BT]
            losses_BT = eager(rows_BT1[:, :-1].contiguous(), targets_BT, loss_reduction="none").view_as(targets_BT)
            nats += float((losses_BT.double() * (weights_BT > 0)).sum())
            num_bytes += float(weights_BT.sum())
        return nats / math.log(2) / num_bytes

    return score


def main() -> None:
    folder, device_batch_size, attention, *flags = sys.argv[1:]
    peer_attention.stand_in(attention)
    scorer = make_scorer(Path(folder), int(device_batch_size))
    for module, name, stand_in in (
        ("nanochat.loss_eval", "evaluate_bpb", scorer),
        ("nanochat.checkpoint_manager", "save_checkpoint", lambda *_, **__: None),
    ):
        peer = importlib.import_module(module)
        getattr(peer, name)  # A checkout without it would go on to use its own.
        setattr(peer, name, stand_in)
    sys.argv = ["base_train", *flags]
    runpy.run_module("scripts.base_train", run_name="__main__")


if __name__ == "__main__":
    main()

"""Bits per byte: how well a model compresses text, comparable between tokenizers.

Loss per token depends on how much text a token holds. So the nats of all target tokens are summed, and divided by the
bytes of text they stand for. Special tokens stand for no text and count on neither side.
"""

import math

import numpy as np
import torch

from nanochat.errors import DataError
from nanochat.loader.batches import inputs_and_targets
from nanochat.model.gpt import GPT
from nanochat.runtime import Runtime, made_progress, sum_over_ranks


@torch.no_grad()
def bits_per_byte(
    model: GPT,
    rows: np.ndarray,
    token_bytes: np.ndarray,
    runtime: Runtime,
    device_batch_size: int,
) -> float:
    """Validate on a fixed list of rows.

    Each row is scored once by one rank and the sums are kept in float64, so the value does not depend on batch
    or world size beyond the rounding of a matmul.

    Args:
        model: the model; its mode and gradients are left alone.
        rows: tokens (N, T + 1) as the loader packs them; those that are not trained on are not scored.
        token_bytes: UTF-8 bytes per token id (V,), 0 for special tokens.
        runtime: this rank's share is rows rank, rank + world size, …
        device_batch_size: rows per forward pass.

    Raises:
        DataError: no row holds any text.
    """
    bytes_of_token = torch.from_numpy(np.asarray(token_bytes, dtype=np.float64)).to(runtime.device)
    totals = torch.zeros(2, dtype=torch.float64, device=runtime.device)
    mine = np.arange(runtime.rank, len(rows), runtime.world_size)
    for start in range(0, len(mine), device_batch_size):
        chosen = torch.from_numpy(rows[mine[start : start + device_batch_size]]).to(runtime.device)
        inputs_BT, targets_BT = inputs_and_targets(chosen)
        weights_BT = bytes_of_token[targets_BT.clamp(min=0)] * (targets_BT >= 0)
        losses_BT = model.token_losses(inputs_BT, targets_BT).double()
        totals[0] += (losses_BT * (weights_BT > 0)).sum()
        totals[1] += weights_BT.sum()
        made_progress()
    nats, num_bytes = sum_over_ranks(totals).tolist()
    if num_bytes == 0:
        raise DataError("the validation rows hold no text, so bits per byte are undefined", "raise --eval-tokens")
    return float(nats / math.log(2) / num_bytes)


def unigram_bits_per_byte(text: bytes) -> float:
    """The entropy of single bytes of a text: what a model scores that knows nothing but their frequencies."""
    counts = np.bincount(np.frombuffer(text, dtype=np.uint8), minlength=256)
    probabilities = counts[counts > 0] / counts.sum()
    return float(-(probabilities * np.log2(probabilities)).sum())

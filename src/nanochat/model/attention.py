"""Causal attention with a sliding window: one function per backend, one contract.

Contract: queries (B, T, H, D), keys and values (B, T, G, D) with G dividing H, and `window`, the number of earlier
tokens a position may see (position i attends to j with i − window ≤ j ≤ i). The result has the queries' shape.
Letters: B batch, T time, H query heads, G key/value heads, D head dimension.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Attention(Protocol):
    """What every backend does."""

    def __call__(self, q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, window: int) -> Tensor:
        """Attend causally within the window."""
        ...


def sdpa_attention(q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, window: int) -> Tensor:
    """PyTorch's own attention, on any device.

    Without a window it runs the fused causal kernel. A window needs an explicit mask: no slower than full attention on
    a CPU at these lengths, but without the savings a windowed kernel gives on a GPU.
    """
    time = q_BTHD.size(1)
    if window >= time:
        return _attention(q_BTHD, k_BTGD, v_BTGD, is_causal=True)
    distance_TT = torch.arange(time, device=q_BTHD.device)
    distance_TT = distance_TT[:, None] - distance_TT[None, :]
    return masked_attention(q_BTHD, k_BTGD, v_BTGD, (distance_TT >= 0) & (distance_TT <= window))


def masked_attention(q_BTHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, mask: Tensor) -> Tensor:
    """Attention of T queries to those of S keys that a mask, broadcast to (B, H, T, S), lets them see."""
    return _attention(q_BTHD, k_BSGD, v_BSGD, attn_mask=mask)


def _attention(
    q_BTHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, *, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    groups = q_BTHD.size(2) // k_BSGD.size(2)
    if groups > 1:
        k_BSGD, v_BSGD = (x.repeat_interleave(groups, dim=2) for x in (k_BSGD, v_BSGD))
    q_BHTD, k_BHSD, v_BHSD = (x.transpose(1, 2) for x in (q_BTHD, k_BSGD, v_BSGD))
    y_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BHSD, v_BHSD, attn_mask=attn_mask, is_causal=is_causal)
    return y_BHTD.transpose(1, 2)

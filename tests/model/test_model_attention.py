"""Attention against its definition, written out for one query at a time."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from nanochat.model.attention import sdpa_attention


def attention_by_definition(q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, window: int) -> Tensor:
    batch, time, heads, dim = q_BTHD.shape
    group_size = heads // k_BTGD.size(2)
    out = torch.zeros_like(q_BTHD)
    for b in range(batch):
        for h in range(heads):
            for i in range(time):
                seen = slice(max(0, i - window), i + 1)
                scores = k_BTGD[b, seen, h // group_size] @ q_BTHD[b, i, h] / math.sqrt(dim)
                out[b, i, h] = scores.softmax(0) @ v_BTGD[b, seen, h // group_size]
    return out


@pytest.mark.parametrize("window", [0, 1, 3, 8, 9, 100])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (3, 1)])
def test_sdpa_is_causal_attention_within_the_window(window: int, heads: int, groups: int) -> None:
    generator = torch.Generator().manual_seed(window)
    q = torch.randn(2, 9, heads, 8, generator=generator)
    k, v = (torch.randn(2, 9, groups, 8, generator=generator) for _ in range(2))
    assert_close(sdpa_attention(q, k, v, window), attention_by_definition(q, k, v, window))

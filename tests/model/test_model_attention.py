"""Attention against its definition, written out for one query at a time."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from nanochat.model.attention import Attention, local_attention, masked_attention, sdpa_attention


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


def attention_by_mask(q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, window: int) -> Tensor:
    time = torch.arange(q_BTHD.size(1))
    distance_TT = time[:, None] - time[None, :]
    return masked_attention(q_BTHD, k_BTGD, v_BTGD, (distance_TT >= 0) & (distance_TT <= window))


def draw(time: int, heads: int, groups: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, time, heads, 8, generator=generator)
    k, v = (torch.randn(2, time, groups, 8, generator=generator) for _ in range(2))
    return q, k, v


def with_gradients(
    attention: Callable[[Tensor, Tensor, Tensor, int], Tensor], inputs: tuple[Tensor, ...], window: int
) -> list[Tensor]:
    q, k, v = (x.detach().requires_grad_() for x in inputs)
    y = attention(q, k, v, window)
    # Another weight for each place, as the sum of a softmax's outputs has next to no gradient.
    return [y, *torch.autograd.grad((y * torch.arange(y.numel()).view(y.shape).cos()).sum(), (q, k, v))]


@pytest.mark.parametrize("window", [0, 1, 3, 8, 9, 100])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (3, 1)])
def test_sdpa_is_causal_attention_within_the_window(window: int, heads: int, groups: int) -> None:
    q, k, v = draw(9, heads, groups, seed=window)
    assert_close(sdpa_attention(q, k, v, window), attention_by_definition(q, k, v, window))


@given(time=st.integers(1, 40), window=st.integers(1, 45), groups=st.sampled_from([1, 2]))
def test_blocks_give_what_a_mask_gives_forwards_and_backwards(time: int, window: int, groups: int) -> None:
    inputs = draw(time, 2, groups, seed=time * 50 + window)
    local, masked = (with_gradients(f, inputs, window) for f in (local_attention, attention_by_mask))
    assert_close(local, masked)


@pytest.mark.parametrize("time", [32, 33, 34, 47, 48, 128, 129])
def test_sdpa_gives_the_same_with_and_without_blocks(time: int) -> None:
    inputs = draw(time, 2, 1)
    assert_close(with_gradients(sdpa_attention, inputs, 32), with_gradients(attention_by_mask, inputs, 32))


@pytest.mark.parametrize("attention", [sdpa_attention, local_attention])
@pytest.mark.parametrize("window", [32, 200])
def test_torch_compile_takes_attention_whole(attention: Attention, window: int) -> None:
    q, k, v = draw(128, 2, 1)
    compiled = torch.compile(attention, fullgraph=True, dynamic=False, backend="aot_eager")
    assert_close(with_gradients(compiled, (q, k, v), window), with_gradients(attention, (q, k, v), window))

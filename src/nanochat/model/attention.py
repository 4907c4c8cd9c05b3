"""Causal attention with a sliding window: one function per backend, one contract.

Contract: queries (B, T, H, D), keys and values (B, T, G, D) with G dividing H, and `window`, the number of earlier
tokens a position may see (position i attends to j with i − window ≤ j ≤ i). The result has the queries' shape.
Letters: B batch, T time, H query heads, G key/value heads, D head dimension.

Which of them a machine can run, and should, is found out by `nanochat.model.attention_choice`.
"""

import functools
import importlib
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# Smaller windows are cut into blocks too small to be worth their calls.
SMALLEST_LOCAL_WINDOW = 32

# PyTorch's varlen attention takes `enable_gqa` and `seqused_k` from 2.12 on.
VARLEN_HAS_OPTIONS = torch.__version__ >= "2.12"

FA4_KERNELS = "flash_attn.cute.interface"


class Attention(Protocol):
    """What every backend does."""

    def __call__(self, q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, window: int) -> Tensor:
        """Attend causally within the window."""
        ...


def sdpa_attention(q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, window: int) -> Tensor:
    """PyTorch's own attention, on any device.

    Without a window it runs the fused causal kernel. That kernel knows no windows, and with a mask in their place it
    computes all T × T scores, so a window that is shorter than the context is cut into blocks.
    """
    time = q_BTHD.size(1)
    if window >= time - 1:
        return _attention(q_BTHD, k_BTGD, v_BTGD, is_causal=True)
    if window >= SMALLEST_LOCAL_WINDOW and 2 * time >= 3 * window:
        return local_attention(q_BTHD, k_BTGD, v_BTGD, window)
    distance_TT = torch.arange(time, device=q_BTHD.device)
    distance_TT = distance_TT[:, None] - distance_TT[None, :]
    return masked_attention(q_BTHD, k_BTGD, v_BTGD, (distance_TT >= 0) & (distance_TT <= window))


def local_attention(q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, window: int) -> Tensor:
    """Attention within a window, of at least one token, by blocks of half a window: T × 1.5 windows of scores.

    The queries of a block see keys of their own block and of the two before it, all by the same mask. The first window
    is plain causal attention. Blocks of a whole window would compute T × 2 windows; those of a quarter copy so many
    keys that they lose at short contexts (benchmarks/LOG.md).
    """
    batch, time, block = *q_BTHD.shape[:2], (window + 1) // 2
    head = 2 * block
    head_BtHD = _attention(q_BTHD[:, :head], k_BTGD[:, :head], v_BTGD[:, :head], is_causal=True)
    if time <= head:
        return head_BtHD
    # What pads the last block lies after all that is real, so only the padding sees it.
    num_blocks = -(-(time - head) // block)
    padding = (0, 0, 0, 0, 0, head + num_blocks * block - time)
    q_BTHD, k_BTGD, v_BTGD = (F.pad(x, padding) for x in (q_BTHD, k_BTGD, v_BTGD))

    def keys_of_blocks(x_BTGD: Tensor) -> Tensor:
        x_BNtGD = x_BTGD.reshape(batch, -1, block, *x_BTGD.shape[2:])
        return torch.cat([x_BNtGD[:, i : i + num_blocks] for i in range(3)], dim=2).flatten(0, 1)

    query = torch.arange(head, head + block, device=q_BTHD.device)
    distance = query[:, None] - torch.arange(head + block, device=q_BTHD.device)[None, :]
    tail_NtHD = masked_attention(
        q_BTHD[:, head:].reshape(batch * num_blocks, block, *q_BTHD.shape[2:]),
        keys_of_blocks(k_BTGD),
        keys_of_blocks(v_BTGD),
        (distance >= 0) & (distance <= window),
    )
    tail_BTHD = tail_NtHD.reshape(batch, num_blocks * block, *q_BTHD.shape[2:])
    return torch.cat((head_BtHD, tail_BTHD[:, : time - head]), dim=1)


def varlen_attention(q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, window: int) -> Tensor:
    """PyTorch's FlashAttention with a window, on a GPU: version 2, or 3 where that has been activated.

    It is an operator with a fake kernel, so torch.compile takes it whole. Rows are given as a batch of sequences of one
    length, whose ends are an arange that Inductor computes once for all layers.
    """
    # Here, as the module imports torch._dynamo, which takes a second and fixes where compiled code is kept.
    from torch.nn.attention.varlen import varlen_attn

    batch, time = q_BTHD.shape[:2]
    # Before, it shares heads without being told.
    shares_heads = q_BTHD.size(2) != k_BTGD.size(2)
    attend = functools.partial(varlen_attn, enable_gqa=shares_heads) if VARLEN_HAS_OPTIONS else varlen_attn
    ends = torch.arange(0, (batch + 1) * time, time, dtype=torch.int32, device=q_BTHD.device)
    y_THD = attend(
        q_BTHD.flatten(0, 1),
        k_BTGD.flatten(0, 1),
        v_BTGD.flatten(0, 1),
        ends,
        ends,
        time,
        time,
        # −1 for no window: the kernels skip their tests for one then.
        window_size=(window if window < time - 1 else -1, 0),
    )
    assert isinstance(y_THD, Tensor)
    return y_THD.reshape(q_BTHD.shape)


def varlen_or_sdpa_attention(q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, window: int) -> Tensor:
    """FlashAttention 2 for layers with a window; for the others PyTorch's own choice, see `prefer_cudnn`."""
    if window < q_BTHD.size(1) - 1:
        return varlen_attention(q_BTHD, k_BTGD, v_BTGD, window)
    return _attention(q_BTHD, k_BTGD, v_BTGD, is_causal=True)


def prefer_cudnn() -> AbstractContextManager[Any]:
    """Inside, PyTorch's own attention is cuDNN's where it can be, as that is about twice as fast on Hopper.

    transformers' pull request 48163 has the figures. What cuDNN cannot take falls to the next kernel of the list. It is
    for training, with its one length, since cuDNN plans anew for each; and it goes around compiled code, because code
    with such a switch in it is traced anew at every start.
    """
    order = [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]
    return sdpa_kernel(order, set_priority=True)


def fa4_attention(q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, window: int) -> Tensor:
    """FlashAttention 4, of the package flash-attn-4, on Hopper and newer.

    Its own autograd function breaks torch.compile's graph, and torch 2.13 can activate its first betas only (it unpacks
    two results of a function that returns five by now), so its two kernels are made an operator here.
    """
    y_BTHD: Tensor = _fa4(q_BTHD, k_BTGD, v_BTGD, window if window < q_BTHD.size(1) - 1 else -1)[0]
    return y_BTHD


@torch.library.custom_op("nanochat::fa4", mutates_args=())
def _fa4(q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, window: int) -> tuple[Tensor, Tensor]:
    kernels = importlib.import_module(FA4_KERNELS)
    # Older versions return only these two.
    y_BTHD, logsumexp_BHT, *_ = kernels._flash_attn_fwd(q_BTHD, k_BTGD, v_BTGD, return_lse=True, **_fa4_mask(window))
    return y_BTHD, logsumexp_BHT


@_fa4.register_fake
def _(q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, window: int) -> tuple[Tensor, Tensor]:
    batch, time, heads, _ = q_BTHD.shape
    return q_BTHD.new_empty(q_BTHD.shape), q_BTHD.new_empty((batch, heads, time), dtype=torch.float32)


@torch.library.custom_op("nanochat::fa4_backward", mutates_args=())
def _fa4_backward(
    dy_BTHD: Tensor, q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, y_BTHD: Tensor, logsumexp_BHT: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = importlib.import_module(FA4_KERNELS)
    dq_BTHD, dk_BTGD, dv_BTGD = kernels._flash_attn_bwd(
        q_BTHD, k_BTGD, v_BTGD, y_BTHD, dy_BTHD.contiguous(), logsumexp_BHT, **_fa4_mask(window)
    )
    return dq_BTHD, dk_BTGD, dv_BTGD


@_fa4_backward.register_fake
def _(
    dy_BTHD: Tensor, q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, y_BTHD: Tensor, logsumexp_BHT: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q_BTHD), torch.empty_like(k_BTGD), torch.empty_like(v_BTGD)


def _fa4_mask(window: int) -> dict[str, Any]:
    if window < 0:
        return {"causal": True}
    return {"causal": False, "window_size_left": window, "window_size_right": 0}


def _save_for_fa4(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.window = inputs
    ctx.save_for_backward(*tensors, *output)


def _differentiate_fa4(ctx: Any, dy_BTHD: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (*_fa4_backward(dy_BTHD, *ctx.saved_tensors, ctx.window), None)


_fa4.register_autograd(_differentiate_fa4, setup_context=_save_for_fa4)


def masked_attention(q_BTHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of T queries to those of S keys that a mask, broadcast to (B, H, T, S), lets them see; None for all."""
    return _attention(q_BTHD, k_BSGD, v_BSGD, attn_mask=mask)


def _attention(
    q_BTHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, *, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    groups = q_BTHD.size(2) // k_BSGD.size(2)
    # On a GPU the kernel that takes masks, or float32, does not share heads: asked to, PyTorch takes none at all.
    shares_heads = q_BTHD.device.type == "cpu" or (attn_mask is None and q_BTHD.dtype != torch.float32)
    if groups > 1 and not shares_heads:
        k_BSGD, v_BSGD = (x.repeat_interleave(groups, dim=2) for x in (k_BSGD, v_BSGD))
    q_BHTD, k_BHSD, v_BHSD = (x.transpose(1, 2) for x in (q_BTHD, k_BSGD, v_BSGD))
    y_BHTD = F.scaled_dot_product_attention(
        *(q_BHTD, k_BHSD, v_BHSD),
        attn_mask=attn_mask,
        is_causal=is_causal,
        enable_gqa=groups > 1 and shares_heads,
    )
    return y_BHTD.transpose(1, 2)

"""Attention kernels for karpathy/nanochat, which fetches FlashAttention 3 from a hub: in its place, what is here.

Without a network the peer falls back to a T × T mask for each window, which says nothing about the peer. So a benchmark
names what it is to use, and prints it: a module with FlashAttention 3's functions, or `varlen`, PyTorch's own
FlashAttention 2, which ours has as well where there is no version 3.
"""

import importlib
import importlib.util
import sys
import types
from typing import Any

import torch
from torch import Tensor

# FlashAttention 3 as its wheel calls it, and as a build from source does.
FLASH_ATTENTION_3 = ("flash_attn_3.flash_attn_interface", "flash_attn_interface")


def best_for_peer(device: torch.device) -> str:
    """What `stand_in` should be told on this machine: the first module that is here, `varlen`, or `own` on a CPU."""
    if device.type != "cuda":
        return "own"
    installed = (module for module in FLASH_ATTENTION_3 if importlib.util.find_spec(module.partition(".")[0]))
    return next(installed, "varlen")


def stand_in(name: str) -> None:
    """Answer the peer's request for FlashAttention 3 with this; with `own` it is left to ask its hub.

    To be called before the peer is imported.
    """
    if name == "own":
        return
    functions: Any = types.SimpleNamespace(flash_attn_func=varlen)
    if name != "varlen":
        functions = importlib.import_module(name)
    kernels: Any = types.ModuleType("kernels")
    kernels.has_kernel = lambda _: True
    kernels.get_kernel = lambda _: types.SimpleNamespace(flash_attn_interface=functions)
    sys.modules["kernels"] = kernels


def varlen(q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, *, causal: bool, window_size: tuple[int, int]) -> Tensor:
    """`flash_attn_func`, by PyTorch's FlashAttention 2."""
    from torch.nn.attention.varlen import varlen_attn

    assert causal, "the peer trains causally"
    batch, time = q_BTHD.shape[:2]
    ends = torch.arange(0, (batch + 1) * time, time, dtype=torch.int32, device=q_BTHD.device)
    q_NHD, k_NGD, v_NGD = (x.flatten(0, 1) for x in (q_BTHD, k_BTGD, v_BTGD))
    y_THD = varlen_attn(q_NHD, k_NGD, v_NGD, ends, ends, time, time, window_size=(window_size[0], 0))
    assert isinstance(y_THD, Tensor)
    return y_THD.view(q_BTHD.shape)

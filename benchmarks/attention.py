"""How fast attention with a window is, forwards and backwards: each backend that this machine can run, in one run.

    python benchmarks/attention.py [--device cpu|cuda] [--rows 2] [--heads 6] [--head-dim 128]

`full` is causal attention without the window and `mask` gives the window as a mask, which is what karpathy/nanochat
does wherever it has no FlashAttention 3; where it has, it calls the kernel that is `fa3` here. `blocks` is our own for
all devices, which `sdpa` takes where it pays. Backends take turns, repeat by repeat, and the fastest repeat counts, so
that what else the machine does hits all alike. `of mask` is the time as a share of that with a mask; FLOP/s count the
scores that the window lets be seen, of both passes (3.5 times the forward one), so what is computed in vain lowers
them.
"""

import argparse
import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nanochat.config import AttentionName, ModelConfig
from nanochat.errors import UsageError
from nanochat.identity import usable_cores
from nanochat.model.attention import Attention, local_attention, masked_attention, sdpa_attention
from nanochat.model.attention_choice import LADDER, choose_attention
from nanochat.runtime import Runtime, allow_tf32, choose_compute_dtype

# A backend's function and what it runs in.
Candidate = tuple[Attention, AbstractContextManager[Any]]

# On a GPU.
PASSES_AT_ONCE = 20
CASES = ((2048, 512), (2048, 1024), (512, 128), (256, 64))


def full(q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, window: int) -> Tensor:
    """Causal attention that forgets its window."""
    return sdpa_attention(q_BTHD, k_BTGD, v_BTGD, q_BTHD.size(1))


def mask(q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, window: int) -> Tensor:
    """The window as a mask."""
    position = torch.arange(q_BTHD.size(1), device=q_BTHD.device)
    distance = position[:, None] - position[None, :]
    return masked_attention(q_BTHD, k_BTGD, v_BTGD, (distance >= 0) & (distance <= window))


def seconds_of(attention: Attention, inputs: list[Tensor], dy: Tensor, window: int) -> float:
    """Of one pass forwards and backwards."""
    q_BTHD, k_BTGD, v_BTGD = inputs

    def both_passes() -> None:
        torch.autograd.grad(attention(q_BTHD, k_BTGD, v_BTGD, window), inputs, dy)

    if dy.device.type != "cuda":
        began = time.perf_counter()
        both_passes()
        return time.perf_counter() - began
    # Several that are queued at once, by the device's own clock: one alone waits for the host.
    # torch ships Event without annotations.
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    start.record()
    for _ in range(PASSES_AT_ONCE):
        both_passes()
    end.record()
    end.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return milliseconds / 1000 / PASSES_AT_ONCE


def candidates(runtime: Runtime, shape: ModelConfig) -> tuple[dict[str, Callable[[], Candidate]], list[str]]:
    """What can be run, by name, each with what activates it, and why the rest cannot."""
    found: dict[str, Callable[[], Candidate]] = {
        "full": lambda: (full, nullcontext()),
        "mask": lambda: (mask, nullcontext()),
        "blocks": lambda: (local_attention, nullcontext()),
    }

    def activate(name: AttentionName) -> Candidate:
        chosen = choose_attention(name, shape, runtime)
        return chosen.function, chosen.context()

    skipped = []
    for name in LADDER:
        try:
            activate(name)
        except UsageError as error:
            skipped.append(error.what)
        else:
            # Chosen anew each time, as FlashAttention 3 takes the place of PyTorch's own for the whole process.
            found[name] = partial(activate, name)
    return found, skipped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--rows", type=int, help="default: 2 on a CPU, 32 on a GPU")
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--kv-heads", type=int, help="default: as many as heads")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="each backend by torch.compile, as on a GPU in training")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--cases", type=json.loads, default=CASES, help="such as [[2048,512]]: context and window")
    asked = parser.parse_args()
    asked.rows = asked.rows or (32 if asked.device == "cuda" else 2)
    torch.set_num_threads(asked.threads)
    device = torch.device(asked.device)
    if device.type == "cuda":
        allow_tf32()
    runtime = Runtime(device, choose_compute_dtype(device, asked.dtype))
    kv_heads = asked.kv_heads or asked.heads
    shape = ModelConfig(vocab_size=64, n_head=asked.heads, n_kv_head=kv_heads, n_embd=asked.heads * asked.head_dim)
    backends, skipped = candidates(runtime, shape)
    heads = f"{asked.heads}/{kv_heads} heads of {asked.head_dim}"
    print(f"{runtime.compute_dtype}, {asked.device}, {asked.rows} rows, {heads}, torch {torch.__version__}")
    print("".join(f"skipped: {reason}\n" for reason in skipped), end="")
    print(f"{'context':>8}{'window':>8}  {'backend':<10}{'ms':>10}{'of mask':>10}{'GFLOP/s':>12}")
    results = []
    for context, window in asked.cases:
        torch.manual_seed(0)
        sizes = (asked.rows, context)
        inputs = [
            torch.randn(*sizes, count, asked.head_dim, device=device, dtype=runtime.compute_dtype, requires_grad=True)
            for count in (asked.heads, kv_heads, kv_heads)
        ]
        dy = torch.randn_like(inputs[0])
        fastest = {name: float("inf") for name in backends}
        compiled: dict[str, Attention] = {}
        for _ in range(asked.repeats):
            for name, activate in backends.items():
                attention, surroundings = activate()
                if asked.compile:
                    attention = compiled.setdefault(name, torch.compile(attention, fullgraph=True, dynamic=False))
                with surroundings:
                    # Once to compile and to warm up what another backend has turned cold.
                    seconds_of(attention, inputs, dy, window)
                    fastest[name] = min(fastest[name], seconds_of(attention, inputs, dy, window))
        visible = sum(min(position, window) + 1 for position in range(context))
        flops = 3.5 * 4 * asked.rows * asked.heads * asked.head_dim * visible
        for name, seconds in fastest.items():
            share = f"{seconds / fastest['mask']:.0%}"
            print(f"{context:8}{window:8}  {name:<10}{1e3 * seconds:10.2f}{share:>10}{flops / seconds / 1e9:12,.1f}")
            results.append({"context": context, "window": window, "backend": name, "seconds": seconds})
    settings = {**vars(asked), "dtype": str(runtime.compute_dtype), "torch": torch.__version__}
    print(json.dumps({"settings": settings, "results": results, "skipped": skipped}))


if __name__ == "__main__":
    main()

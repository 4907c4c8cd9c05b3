"""Which attention a machine should use: the first of a ladder that is there and computes what it should.

FlashAttention comes in versions, wheels and betas, each for some GPUs, and a wrong kernel trains a worse model without
a word. So each is tried, forwards and backwards, on a small case whose answer is known, before anything is trained.
"""

import importlib.util
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, ParamSpec

import torch
from torch import Tensor
from torch.nn.attention import (
    activate_flash_attention_impl,
    current_flash_attention_impl,
    restore_flash_attention_impl,
)

from nanochat.config import AttentionName, ModelConfig
from nanochat.errors import UsageError
from nanochat.model.attention import (
    Attention,
    fa4_attention,
    masked_attention,
    prefer_cudnn,
    sdpa_attention,
    varlen_attention,
    varlen_or_sdpa_attention,
)
from nanochat.runtime import Runtime, gather_from_ranks

FA3_MODULE: Final = "flash_attn_interface"
FA4_MODULE: Final = "flash_attn.cute"

Arguments = ParamSpec("Arguments")

PROBE_TOKENS = 256
PROBE_WINDOWS = (PROBE_TOKENS // 4, PROBE_TOKENS)

# Distance from the exact result, as a share of its norm. PyTorch's own kernel on a CPU stays below half of it, and TF32
# in place of float32 may not go beyond it; a window that is off by one token is several times as far away.
TOLERANCES = {torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float32: 2**-9}


@dataclass(frozen=True)
class Backend:
    """One rung of the ladder.

    Attributes:
        load: import what it needs and give its function.
        capability: the oldest GPU that it runs on; None where it needs no GPU.
        newest: the newest major version of those GPUs, where there is one.
        module: what must be importable.
        context: what training, forwards, runs in.
    """

    load: Callable[[], Attention]
    capability: tuple[int, int] | None = None
    newest: int | None = None
    module: str | None = None
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True)
class ChosenAttention:
    """The attention that all ranks use.

    Attributes:
        name: of its backend.
        function: what computes it.
        passed_over: the backends before it on the ladder, each with the reason.
        context: what training, forwards, runs in.
    """

    name: AttentionName
    function: Attention
    passed_over: Mapping[str, str]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext

    def around(self, forward: Callable[Arguments, Tensor]) -> Callable[Arguments, Tensor]:
        """A function of a model with this attention, compiled or not, in the context that is for training."""

        def forward_in_context(*arguments: Arguments.args, **named: Arguments.kwargs) -> Tensor:
            with self.context():
                return forward(*arguments, **named)

        return forward_in_context

    def __str__(self) -> str:
        """One line for the console."""
        reasons: dict[str, list[str]] = {}
        for name, reason in self.passed_over.items():
            reasons.setdefault(reason, []).append(name)
        return "; ".join([f"attention: {self.name}", *(f"not {', '.join(by)}: {why}" for why, by in reasons.items())])


def _load_fa3() -> Attention:
    activate_flash_attention_impl("FA3")
    return varlen_attention


LADDER: Mapping[AttentionName, Backend] = MappingProxyType(
    {
        "fa3": Backend(_load_fa3, capability=(9, 0), newest=9, module=FA3_MODULE),
        "fa4": Backend(lambda: fa4_attention, capability=(9, 0), module=FA4_MODULE),
        "varlen": Backend(lambda: varlen_or_sdpa_attention, capability=(8, 0), context=prefer_cudnn),
        "sdpa": Backend(lambda: sdpa_attention),
    }
)


def choose_attention(asked: AttentionName, shape: ModelConfig, runtime: Runtime) -> ChosenAttention:
    """The backend asked for, or the first of the ladder that works on every rank.

    Args:
        asked: its name; auto for the best.
        shape: the model's, whose heads are what it is tried on.
        runtime: this process. All ranks must come here, and all get the same.

    Raises:
        UsageError: the backend asked for, or each of the ladder, does not work here.
    """
    passed_over: dict[str, str] = {}
    for name, backend in LADDER.items():
        if asked not in ("auto", name):
            continue
        # Also where another rank found it wanting: it changes what PyTorch's own attention runs.
        if current_flash_attention_impl() is not None:
            restore_flash_attention_impl()
        found = _try(backend, shape, runtime)
        outcomes: list[str | None] = gather_from_ranks(found if isinstance(found, str) else None)
        reason = next((outcome for outcome in outcomes if outcome is not None), None)
        if reason is None and not isinstance(found, str):
            return ChosenAttention(name, found, passed_over, backend.context)
        passed_over[name] = str(reason)
    if current_flash_attention_impl() is not None:
        restore_flash_attention_impl()
    shown = "; ".join(f"{name}: {reason}" for name, reason in passed_over.items())
    raise UsageError(f"--attention {asked} does not work here ({shown})", "use --attention auto, or --device cpu")


def missing(backend: Backend, device: torch.device, dtype: torch.dtype) -> str | None:
    """What a backend needs and does not find, without loading it; None if nothing."""
    if backend.capability is not None:
        if device.type != "cuda":
            return "needs a GPU"
        if dtype == torch.float32:
            return "needs bfloat16"
        capability = torch.cuda.get_device_capability(device)
        if capability < backend.capability or capability[0] > (backend.newest or capability[0]):
            limit = "only" if backend.newest == backend.capability[0] else "or newer"
            needed, here = (".".join(map(str, numbers)) for numbers in (backend.capability, capability))
            return f"needs compute capability {needed} {limit}, this GPU has {here}"
    if backend.module is not None and not is_installed(backend.module):
        return f"{backend.module} is not installed"
    return None


def is_installed(module: str) -> bool:
    """Whether a module can be found. Those above it are imported, it is not."""
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def largest_error(
    attention: Attention, *, num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device, dtype: torch.dtype
) -> float:
    """How far result and gradients are from exact ones, as a share of their norm: the worst, with and without a window.

    The inputs are rounded to the dtype first and then taken as exact.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int) -> Tensor:
        return torch.randn(2, PROBE_TOKENS, heads, head_dim, generator=generator).to(device, dtype)

    q, k, v, dy = draw(num_heads), draw(num_kv_heads), draw(num_kv_heads), draw(num_heads)
    worst = 0.0
    for window in PROBE_WINDOWS:
        distance = torch.arange(PROBE_TOKENS, device=device)
        distance = distance[:, None] - distance[None, :]
        mask = (distance >= 0) & (distance <= window)
        computed = _with_gradients(attention, window, q, k, v, dy)
        exact = _with_gradients(masked_attention, mask, q.double(), k.double(), v.double(), dy.double())
        for ours, theirs in zip(computed, exact, strict=True):
            error = float((ours.double() - theirs).norm() / theirs.norm())
            # Not max(), to which NaN is no larger than anything.
            worst = error if not error <= worst else worst
    return worst


def _try(backend: Backend, shape: ModelConfig, runtime: Runtime) -> Attention | str:
    """A backend's function, or why it cannot be used."""
    reason = missing(backend, runtime.device, runtime.compute_dtype)
    if reason is not None:
        return reason
    num_kv_heads = min(shape.n_kv_head, 2)
    try:
        attention = backend.load()
        with backend.context():
            error = largest_error(
                attention,
                num_heads=num_kv_heads * (shape.n_head // shape.n_kv_head),
                num_kv_heads=num_kv_heads,
                head_dim=shape.head_dim,
                device=runtime.device,
                dtype=runtime.compute_dtype,
            )
    except Exception as failure:
        # Compilers, loaders and kernels of others fail in ways of their own, and none of them is a reason to stop.
        first_line = (str(failure).strip().splitlines() or [""])[0]
        return f"fails with {type(failure).__name__}: {first_line[:200]}"
    tolerance = TOLERANCES[runtime.compute_dtype]
    return attention if error <= tolerance else f"is off by {error:.2g}, {tolerance:.2g} is allowed"


def _with_gradients(
    attention: Callable[..., Tensor], window: int | Tensor, q: Tensor, k: Tensor, v: Tensor, dy: Tensor
) -> tuple[Tensor, ...]:
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    y = attention(*inputs, window)
    return y.detach(), *torch.autograd.grad(y, inputs, dy)

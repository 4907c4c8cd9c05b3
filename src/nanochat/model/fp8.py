"""Matrix products in fp8: the three of a linear layer, on GPUs from compute capability 8.9 on.

fp8 tensor cores multiply about twice as fast as bf16 ones. What a layer has to pay for that is a scale and a cast of
every operand, and second copies: a product reads both operands along the dimension it sums over, forward and backward
sum over different ones, and fp8 kernels transpose nothing on the way.

=================  ==================  =================  ======  =================
product            first operand       second operand     result  accumulation
=================  ==================  =================  ======  =================
y = x · Wᵀ         x        e4m3       W        e4m3      as x    fast
dx = dy · W        dy       e5m2       Wᵀ       e4m3      as dy   exact
dW = dyᵀ · x       dyᵀ      e5m2       xᵀ       e4m3      fp32    exact
=================  ==================  =================  ======  =================

e4m3 has the digits, e5m2 the range that gradients need (arXiv 2209.05433). One scale per tensor, from its own largest
value: cuBLAS applies those at no cost, while a scale per row was slower than bf16 (nanochat's dev/LOG.md, 2026-02).
Fast accumulation stays within the tensor core, at about 14 bits (arXiv 2412.19437, section 3.3.2); gradients are
summed over whole batches and get the exact one, as in torchao's tensorwise recipe. dW comes out in fp32, as it is kept.

Weights change once per optimizer step, so they are quantised once per step, in both layouts, not in each micro-batch
and not again for backward. Activations are quantised on the way, in plain operations, which torch.compile joins to
what makes them and does once for the three layers that read the same one. Of x, xᵀ in fp8 is kept for backward, which
takes half the memory of bf16, unless the compiler prefers to compute it again.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nanochat.errors import UsageError
from nanochat.model.size import FP8_MULTIPLE

FIRST_CAPABILITY = (8, 9)
# Of a tensor of zeros, any scale will do.
SMALLEST_PEAK = 1e-12


def quantise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cast to fp8 so that the largest value becomes the largest that the type holds.

    Returns:
        The values, and the 0-d fp32 scale to multiply them by. If a value is not finite, no product of them is, so
        that the loop's guard sees it.
    """
    largest = torch.finfo(dtype).max
    scale = x.abs().amax().float().clamp(min=SMALLEST_PEAK) / largest
    # The cast wraps or makes NaN of what is too large, and a quotient may be by its last bit.
    return (x.float() / scale).clamp(-largest, largest).to(dtype), scale


def multiply(
    first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], dtype: torch.dtype, *, fast: bool = False
) -> Tensor:
    """(M, K) · (N, K)ᵀ → (M, N), of quantised matrices that are both contiguous, with their scales."""
    # Not F.scaled_mm: before 2.13 torch.compile breaks its graph there, in each layer, and a CPU has no kernel for it.
    return torch._scaled_mm(
        first[0], second[0].t(), scale_a=first[1], scale_b=second[1], out_dtype=dtype, use_fast_accum=fast
    )


class _Product(torch.autograd.Function):
    """x · Wᵀ. The weight itself is there to receive its gradient."""

    @staticmethod
    def forward(
        ctx: Any, x_MK: Tensor, weight_NK: Tensor, quantised_NK: Tensor, quantised_KN: Tensor, scale: Tensor
    ) -> Tensor:
        quantised_MK, x_scale = quantise(x_MK, torch.float8_e4m3fn)
        ctx.save_for_backward(quantised_MK.t().contiguous(), x_scale, quantised_KN, scale)
        ctx.weight_dtype = weight_NK.dtype
        return multiply((quantised_MK, x_scale), (quantised_NK, scale), x_MK.dtype, fast=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_MN: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        quantised_KM, x_scale, quantised_KN, scale = ctx.saved_tensors
        quantised_MN, gradient_scale = quantise(gradient_MN, torch.float8_e5m2)
        x_gradient_MK = multiply((quantised_MN, gradient_scale), (quantised_KN, scale), gradient_MN.dtype)
        quantised_NM = quantised_MN.t().contiguous()
        weight_gradient_NK = multiply((quantised_NM, gradient_scale), (quantised_KM, x_scale), ctx.weight_dtype)
        return x_gradient_MK, weight_gradient_NK, None, None, None


class Fp8Weight(nn.Module):
    """The fp8 copies of one weight (N, K), which count only while `live` is set.

    Buffers that stay where they are, so that compiled code is compiled once; and not a part of the state dict.
    """

    def __init__(self, weight_NK: Tensor, *, compiled: bool) -> None:
        super().__init__()
        device, dtype = weight_NK.device, torch.float8_e4m3fn
        self.register_buffer("rows_NK", torch.empty(weight_NK.shape, device=device, dtype=dtype), persistent=False)
        self.register_buffer("rows_KN", torch.empty(weight_NK.t().shape, device=device, dtype=dtype), persistent=False)
        self.register_buffer("scale", torch.empty((), device=device), persistent=False)
        self.rows_NK: Tensor
        self.rows_KN: Tensor
        self.scale: Tensor
        self.live = False
        self._write = _compiled_write_copies() if compiled else _write_copies

    @torch.no_grad()
    def refresh(self, weight_NK: Tensor) -> None:
        """Take the weight's present values."""
        self._write(weight_NK.detach(), self.rows_NK, self.rows_KN, self.scale)
        self.live = True

    def forward(self, x: Tensor, weight_NK: Tensor) -> Tensor:
        """(…, K) → (…, N), the gradient going to `weight_NK`."""
        # torch ships `apply` without annotations.
        y_MN: Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            x.reshape(-1, x.size(-1)), weight_NK, self.rows_NK, self.rows_KN, self.scale
        )
        return y_MN.view(*x.shape[:-1], -1)


def _write_copies(weight_NK: Tensor, rows_NK: Tensor, rows_KN: Tensor, scale: Tensor) -> None:
    quantised_NK, fresh_scale = quantise(weight_NK, torch.float8_e4m3fn)
    rows_NK.copy_(quantised_NK)
    rows_KN.copy_(quantised_NK.t())
    scale.copy_(fresh_scale)


@functools.cache
def _compiled_write_copies() -> Callable[[Tensor, Tensor, Tensor, Tensor], None]:
    # Not at import, where PyTorch would settle on its own place for compiled code.
    return torch.compile(_write_copies, dynamic=False)


def fits(weight: Tensor) -> bool:
    """Whether fp8 kernels can multiply by this matrix."""
    return all(size % FP8_MULTIPLE == 0 for size in weight.shape)


def check_fp8(device: torch.device) -> None:
    """Refuse a GPU without fp8. A CPU can do it all, slowly.

    Raises:
        UsageError: names the GPU.
    """
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if torch.version.hip is not None or capability < FIRST_CAPABILITY:
            name = torch.cuda.get_device_name(device)
            raise UsageError(f"--fp8 needs an NVIDIA GPU from Ada or Hopper on, this is {name}", "leave out --fp8")

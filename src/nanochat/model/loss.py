"""Softcapped cross-entropy that never holds all logits.

Logits are capped at ±15 by 15·tanh(l/15) (Gemma 2, arXiv 2408.00118), so exp() cannot overflow and the softmax
needs no pass for its maximum. Loss and gradient of a chunk of rows are computed together while its logits are still in
cache; what is kept for backward is the gradient of the hidden states and of the head, not the (rows, vocabulary)
matrix. On a CPU this takes 42 % of the time of the plain composition, and less than its compiled form
(benchmarks/LOG.md); on a GPU it is memory that is saved.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

LOGIT_CAP = 15.0
IGNORED_TARGET = -1

# Rows per chunk: on a CPU small enough for the logits to stay in cache, on a GPU large enough to fill it.
CHUNK_ROWS = {"cpu": 256, "cuda": 8192}


def _half_tanh(logits: Tensor) -> Tensor:
    """tanh(logits / cap) in float32, in place where it can be, by way of the sigmoid, which is faster on a CPU."""
    return logits.float().mul_(2 / LOGIT_CAP).sigmoid_().mul_(2).sub_(1)


def softcap(logits: Tensor) -> Tensor:
    """Cap raw logits smoothly at ±15, in float32."""
    return LOGIT_CAP * torch.tanh(logits.float() / LOGIT_CAP)


def less_one_at(probability_NV: Tensor, targets_N1: Tensor, *, is_fused: bool) -> Tensor:
    """Subtract 1 from each row's target, perhaps in place.

    Args:
        probability_NV: rows over the vocabulary.
        targets_N1: one token id per row.
        is_fused: in an operation that a compiler joins to what comes before and after. A scatter would have it write
            the rows to memory and read them again, as float32; on a CPU, in whose cache they are, it is faster.
    """
    if is_fused:
        tokens_V = torch.arange(probability_NV.size(1), device=targets_N1.device)
        return probability_NV - (tokens_V == targets_N1).to(probability_NV.dtype)
    minus_one_N1 = torch.full_like(targets_N1, -1, dtype=probability_NV.dtype)
    return probability_NV.scatter_add_(1, targets_N1, minus_one_N1)


class _SoftcappedCrossEntropy(torch.autograd.Function):
    """Sum of token losses, with the gradient computed on the way forward."""

    @staticmethod
    def forward(ctx: Any, hidden_NC: Tensor, head_VC: Tensor, targets_N: Tensor, chunk_rows: int) -> Tensor:
        """Return the sum of the losses of the rows whose target is not ignored; N rows, C channels, V tokens."""
        weight_VC = head_VC.to(hidden_NC.dtype)
        hidden_gradient_NC = torch.empty_like(hidden_NC)
        head_gradient_VC = torch.zeros_like(head_VC)
        total = torch.zeros((), dtype=torch.float32, device=hidden_NC.device)
        for start in range(0, hidden_NC.size(0), chunk_rows):
            chunk_NC = hidden_NC[start : start + chunk_rows]
            targets = targets_N[start : start + chunk_rows, None]
            counted = targets != IGNORED_TARGET
            targets = targets.clamp(min=0)
            tanh_NV = _half_tanh(F.linear(chunk_NC, weight_VC))
            probability_NV = (tanh_NV * LOGIT_CAP).exp_()
            normaliser = probability_NV.sum(dim=1, keepdim=True)
            losses = normaliser.log() - LOGIT_CAP * tanh_NV.gather(1, targets)
            # Not in place: compiled by torch 2.11, the result would have no gradient, and nothing would be trained.
            total = total + (losses * counted).sum()
            # d loss / d logit = (softmax − one-hot) · (1 − tanh²), the last factor from the cap.
            probability_NV.div_(normaliser)
            is_fused = hidden_NC.is_cuda and torch.compiler.is_compiling()
            probability_NV = less_one_at(probability_NV, targets, is_fused=is_fused)
            slope_NV = tanh_NV.square_().neg_().add_(1)
            gradient_NV = probability_NV.mul_(slope_NV).mul_(counted).to(hidden_NC.dtype)
            hidden_gradient_NC[start : start + chunk_rows] = gradient_NV @ weight_VC
            head_gradient_VC += gradient_NV.t() @ chunk_NC
        ctx.save_for_backward(hidden_gradient_NC, head_gradient_VC)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Scale the stored gradients by the gradient of the sum."""
        hidden_gradient_NC, head_gradient_VC = ctx.saved_tensors
        return hidden_gradient_NC * scale.to(hidden_gradient_NC.dtype), head_gradient_VC * scale, None, None


def softcapped_cross_entropy(
    hidden_BTC: Tensor, head_VC: Tensor, targets_BT: Tensor, chunk_rows: int | None = None
) -> Tensor:
    """Sum of the cross-entropies in nats of the targets that are not −1, with gradients for both inputs.

    A sum, because only the training loop knows over how many targets of all micro-batches and ranks to take the mean.

    Args:
        hidden_BTC: normalised hidden states, in the compute dtype.
        head_VC: the unembedding, float32.
        targets_BT: int64 token ids; −1 where a position does not count.
        chunk_rows: rows computed at once; it changes time and memory, not the result.

    Returns:
        A 0-d float32 tensor.
    """
    hidden_NC, targets_N = hidden_BTC.flatten(0, 1), targets_BT.flatten()
    rows = chunk_rows or CHUNK_ROWS.get(hidden_BTC.device.type, CHUNK_ROWS["cuda"])
    # torch ships `apply` without annotations.
    total: Tensor = _SoftcappedCrossEntropy.apply(hidden_NC, head_VC, targets_N, rows)  # type: ignore[no-untyped-call]
    return total


@torch.no_grad()
def softcapped_token_losses(hidden_BTC: Tensor, head_VC: Tensor, targets_BT: Tensor) -> Tensor:
    """The loss of every token in nats, float32 (B, T), zero where the target is −1. For evaluation."""
    weight_VC = head_VC.to(hidden_BTC.dtype)
    rows = CHUNK_ROWS.get(hidden_BTC.device.type, CHUNK_ROWS["cuda"])
    losses = []
    for chunk_NC, targets in zip(
        torch.split(hidden_BTC.flatten(0, 1), rows), torch.split(targets_BT.flatten(), rows), strict=True
    ):
        capped_NV = _half_tanh(F.linear(chunk_NC, weight_VC)).mul_(LOGIT_CAP)
        target_logits = capped_NV.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
        losses.append((capped_NV.exp_().sum(dim=1).log() - target_logits) * (targets != IGNORED_TARGET))
    return torch.cat(losses).view_as(targets_BT)

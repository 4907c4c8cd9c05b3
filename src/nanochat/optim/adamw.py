"""AdamW (Loshchilov & Hutter, arXiv 1711.05101), for embeddings, the head and scalars."""

import torch
from torch import Tensor
from torch.optim.adamw import adamw


@torch.no_grad()
def adamw_update(
    parameters: Tensor,
    gradients: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step_count: Tensor,
    is_finite: Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Update one flat tensor of parameters and its two moments in place.

    It is PyTorch's own fused kernel: one pass over memory, on CPU as on CUDA, where the same formula in
    separate operations makes about ten. A flat tensor makes it one call for a whole group, so nothing is left
    to compile.

    Args:
        parameters: fp32 [N].
        gradients: fp32 [N].
        exp_avg: running mean of the gradients, fp32 [N].
        exp_avg_sq: running mean of their squares, fp32 [N].
        step_count: updates before this one, for the bias correction: fp32 [], on the parameters' device.
        is_finite: bool [], on the same device. Where it is false, nothing changes, whatever the gradients hold.
        lr: learning rate; also multiplies the weight decay.
        betas: decay of the two running means.
        eps: added to the root of the corrected second moment.
        weight_decay: decoupled decay, applied before the update.
    """
    adamw(
        [parameters],
        [gradients],
        [exp_avg],
        [exp_avg_sq],
        [],
        # Counted up in place.
        [step_count.clone()],
        fused=True,
        found_inf=(~is_finite).float(),
        amsgrad=False,
        maximize=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=lr,
        eps=eps,
        weight_decay=weight_decay,
    )

"""Muon: momentum whose update is replaced by the nearest orthogonal matrix, for the matrices of the blocks.

Momentum of a matrix is nearly low rank, a few directions drown the others; an orthogonal update moves all of
them alike. What is used here beyond the original (Keller Jordan, kellerjordan.github.io/posts/muon), in order
of use:

- MuonEq (arXiv 2603.28254): rows are brought to equal norm first, so the spectrum starts better conditioned;
- Polar Express (arXiv 2505.16932): five polynomial steps with coefficients optimal for five, in place of
  Newton–Schulz;
- Muon+ (arXiv 2602.21545): the Frobenius norm is set to that of an exactly orthogonal matrix, which corrects
  what five steps leave short;
- NorMuon (arXiv 2510.05491): a running second moment per row (or column) evens out the neurons' step sizes;
- cautious weight decay (arXiv 2510.12402): a weight decays only where the update does not push it outwards.

MuonEq, Muon+ and NorMuon only rescale rows or columns, so their factors are computed as small vectors: one
pass over the matrices to measure before the products and one after, whatever is combined.

All functions take stacks of K matrices of one shape m × n and treat each by itself: their shape is [K, m, n].
"""

import torch
from torch import Tensor

# A Python number, or a 0-d CPU tensor where torch.compile would otherwise recompile for each value.
Scalar = float | Tensor

# Polar Express for 5 steps, safety factor 2e-2, cushion 2, as computed by the paper's algorithm (arXiv
# 2505.16932) and used by karpathy/nanochat at 92d63d4.
POLAR_EXPRESS_COEFFICIENTS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)

# The polynomials hold for singular values up to 1; rounding in bf16 must not lift one above.
NORM_MARGIN = 1.01

# Only guards divisions. It is far below any gradient that carries information, so that updates do not depend
# on the scale of the loss, and far above where the squares of fp32 numbers vanish.
TINY = 1e-15

# Smallest second moment that is divided by. An orthogonal matrix has 1 / max(m, n), a dead row 0.
SECOND_MOMENT_FLOOR = 1e-10


def second_moment_shape(rows: int, columns: int) -> tuple[int, int]:
    """Shape of the factored second moment: one value per row of a tall matrix, per column of a wide one."""
    return (rows, 1) if rows >= columns else (1, columns)


def orthogonalize(update_Kmn: Tensor, work_dtype: torch.dtype) -> Tensor:
    """Replace each matrix by (approximately) U Vᵀ of its singular value decomposition U S Vᵀ.

    Rows are equilibrated first, so the result is that of the equilibrated matrix. A zero row stays zero, as
    does a zero matrix. Singular values above 3e-3 of the Frobenius norm end between 0.86 and 1.14, smaller
    ones lower: that is as good for training as exact, and cheap.

    Args:
        update_Kmn: stack of matrices.
        work_dtype: dtype of the matrix products: bf16 where the hardware is fast in it, which is accurate
            enough.

    Returns:
        Stack of the same shape in `work_dtype`.
    """
    norm_Km1: Tensor = torch.linalg.vector_norm(update_Kmn, dim=-1, keepdim=True)
    divisor_Km1 = norm_Km1.clamp_min(TINY)
    # Rows that are not zero now count 1 each, so the Frobenius norm needs no second look at the matrices.
    frobenius_K11 = (norm_Km1 / divisor_Km1).square().sum(dim=-2, keepdim=True).sqrt().clamp_min(1)
    x_Kmn = (update_Kmn / (divisor_Km1 * frobenius_K11 * NORM_MARGIN)).to(work_dtype)

    # The Gram matrix is smallest on the smaller side; s = min(m, n), l = max(m, n).
    is_tall = x_Kmn.size(-2) > x_Kmn.size(-1)
    x_Ksl = x_Kmn.transpose(-2, -1) if is_tall else x_Kmn
    for a, b, c in POLAR_EXPRESS_COEFFICIENTS:
        gram_Kss = x_Ksl @ x_Ksl.mT
        polynomial_Kss = torch.baddbmm(gram_Kss, gram_Kss, gram_Kss, beta=b, alpha=c)
        x_Ksl = torch.baddbmm(x_Ksl, polynomial_Kss, x_Ksl, beta=a)
    return x_Ksl.transpose(-2, -1) if is_tall else x_Ksl


def variance_scale(direction_Kmn: Tensor, second_moment: Tensor, weight: Scalar) -> Tensor:
    """What to multiply a direction by to even out its rows (NorMuon) and set its Frobenius norm (Muon+).

    Each row of a tall matrix, or column of a wide one, is divided by the root of its running mean square;
    then the whole gets Frobenius norm √min(m, n), that of an orthogonal matrix.

    Args:
        direction_Kmn: stack of orthogonalised matrices.
        second_moment: fp32 [K, *second_moment_shape(m, n)], updated in place.
        weight: of this direction in the second moment, 1 less its decay.

    Returns:
        The factors, fp32, shaped like `second_moment`.
    """
    rows, columns = direction_Kmn.shape[-2:]
    averaged_dim = -1 if rows >= columns else -2
    target = min(rows, columns)
    squares = direction_Kmn.float().square().sum(dim=averaged_dim, keepdim=True)
    # Taken at the target norm, so that the second moments of different steps compare.
    norm_correction_K11 = target / squares.sum(dim=(-2, -1), keepdim=True).clamp_min(TINY)
    mean_square = squares * norm_correction_K11 / direction_Kmn.size(averaged_dim)
    second_moment.lerp_(mean_square, weight)

    variance = second_moment.clamp_min(SECOND_MOMENT_FLOOR)
    norm_square_K11 = (squares / variance).sum(dim=(-2, -1), keepdim=True).clamp_min(TINY)
    return torch.rsqrt(norm_square_K11 * variance / target)


@torch.no_grad()
def muon_update(
    parameters_Kmn: Tensor,
    gradients_Kmn: Tensor,
    momentum_buffer_Kmn: Tensor,
    second_moment: Tensor,
    *,
    is_finite: Tensor,
    lr: Scalar,
    momentum: Scalar,
    beta2: Scalar,
    weight_decay: Scalar,
    work_dtype: torch.dtype,
) -> None:
    """Update a stack of matrices and its state in place.

    Args:
        parameters_Kmn: fp32 weights.
        gradients_Kmn: fp32 gradients.
        momentum_buffer_Kmn: fp32 running mean of the gradients.
        second_moment: fp32 [K, *second_moment_shape(m, n)].
        is_finite: bool [], on their device. Where it is false, nothing changes, whatever the gradients hold.
        lr: learning rate of a square matrix; tall ones get √(m / n) of it, so that the root-mean-square
            change of their outputs is the same.
        momentum: decay of the running mean.
        beta2: decay of the second moment.
        weight_decay: decoupled, so multiplied by the learning rate.
        work_dtype: dtype of the matrix products.
    """
    rows, columns = parameters_Kmn.shape[-2:]
    # A skipped step is one towards the mean that there is, of length 0: multiplied away, a NaN would stay.
    gradients_Kmn = torch.where(is_finite, gradients_Kmn, momentum_buffer_Kmn)
    momentum_buffer_Kmn.lerp_(gradients_Kmn, 1 - momentum)
    nesterov_Kmn = gradients_Kmn.lerp_(momentum_buffer_Kmn, momentum)

    direction_Kmn = orthogonalize(nesterov_Kmn, work_dtype)
    lr = is_finite * lr * max(1.0, rows / columns) ** 0.5
    step_Kmn = direction_Kmn * (lr * variance_scale(direction_Kmn, second_moment, is_finite * (1 - beta2)))

    # The step is subtracted, so where it has the weight's sign it shrinks the weight, and decay may help it.
    is_shrinking_Kmn = step_Kmn * parameters_Kmn >= 0
    parameters_Kmn.mul_(1 - lr * weight_decay * is_shrinking_Kmn).sub_(step_Kmn)

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nanochat.optim.adamw import adamw_update

TAKEN = torch.tensor(True)
SETTINGS = {"lr": 0.3, "betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": 0.1}


@settings(deadline=None, max_examples=25)
@given(
    size=st.integers(1, 200),
    lr=st.floats(1e-5, 0.5),
    betas=st.tuples(st.floats(0, 0.97), st.floats(0.5, 0.999)),
    weight_decay=st.floats(0, 0.3),
    seed=st.integers(0, 1000),
)
def test_it_is_the_textbook_formula(
    size: int, lr: float, betas: tuple[float, float], weight_decay: float, seed: int
) -> None:
    torch.manual_seed(seed)
    weights = torch.randn(size)
    exact = weights.double()
    m, v = torch.zeros_like(exact), torch.zeros_like(exact)
    exp_avg, exp_avg_sq = torch.zeros(size), torch.zeros(size)
    for step in range(1, 6):
        gradient = torch.randn(size)
        g = gradient.double()
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        exact = exact - lr * weight_decay * exact
        exact = exact - lr * (m / (1 - betas[0] ** step)) / ((v / (1 - betas[1] ** step)).sqrt() + 1e-10)
        adamw_update(
            weights,
            gradient,
            exp_avg,
            exp_avg_sq,
            step_count=torch.tensor(step - 1.0),
            is_finite=TAKEN,
            lr=lr,
            betas=betas,
            eps=1e-10,
            weight_decay=weight_decay,
        )
    # Gradients near zero divide rounding errors by themselves, so the scale of the updates is the yardstick.
    torch.testing.assert_close(weights.double(), exact, rtol=1e-5, atol=1e-5 * max(lr, 0.1))
    torch.testing.assert_close(exp_avg.double(), m, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(exp_avg_sq.double(), v, rtol=1e-5, atol=1e-6)


def test_it_agrees_with_the_optimizer_of_pytorch() -> None:
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(1000))
    weights, exp_avg, exp_avg_sq = parameter.detach().clone(), torch.zeros(1000), torch.zeros(1000)
    reference = torch.optim.AdamW([parameter], lr=0.01, betas=(0.8, 0.96), eps=1e-10, weight_decay=0.1, foreach=False)
    for step in range(1, 11):
        parameter.grad = torch.randn(1000)
        reference.step()
        adamw_update(
            weights,
            parameter.grad,
            exp_avg,
            exp_avg_sq,
            step_count=torch.tensor(step - 1.0),
            is_finite=TAKEN,
            lr=0.01,
            betas=(0.8, 0.96),
            eps=1e-10,
            weight_decay=0.1,
        )
    torch.testing.assert_close(weights, parameter.detach(), rtol=1e-6, atol=1e-6)


def test_padding_stays_zero() -> None:
    zeros = [torch.zeros(5) for _ in range(4)]
    for step in range(1, 4):
        adamw_update(*zeros, step_count=torch.tensor(step - 1.0), is_finite=TAKEN, **SETTINGS)
    assert all(tensor.eq(0).all() for tensor in zeros)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1.0])
def test_a_skipped_update_changes_not_one_bit_whatever_the_gradient(bad: float) -> None:
    torch.manual_seed(0)
    weights, gradient, exp_avg, exp_avg_sq = (torch.rand(100) for _ in range(4))
    gradient[::7] = bad
    step_count = torch.tensor(3.0)
    before = [tensor.clone() for tensor in (weights, exp_avg, exp_avg_sq, step_count)]
    adamw_update(
        weights, gradient, exp_avg, exp_avg_sq, step_count=step_count, is_finite=torch.tensor(False), **SETTINGS
    )
    assert all(map(torch.equal, (weights, exp_avg, exp_avg_sq, step_count), before))

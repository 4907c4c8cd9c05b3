import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nanochat.optim.muon import (
    POLAR_EXPRESS_COEFFICIENTS,
    muon_update,
    orthogonalize,
    second_moment_shape,
    variance_scale,
)

TAKEN = torch.tensor(True)
SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 24), st.integers(1, 24))


def naive_orthogonalize(update: Tensor) -> Tensor:
    """Polar Express on the singular values themselves, one by one, in fp64."""
    rows = update.double()
    rows = torch.stack([row / row.norm() if row.norm() > 0 else row for row in rows])
    u, s, vh = torch.linalg.svd(rows / (1.01 * rows.norm()), full_matrices=False)
    for a, b, c in POLAR_EXPRESS_COEFFICIENTS:
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ vh


def naive_muon_update(
    parameter: Tensor,
    gradient: Tensor,
    momentum_buffer: Tensor,
    second_moment: Tensor,
    lr: float,
    momentum: float,
    beta2: float,
    weight_decay: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The published algorithms one after the other, one matrix and one element at a time, in fp64."""
    m, n = parameter.shape
    momentum_buffer = momentum * momentum_buffer + (1 - momentum) * gradient
    direction = naive_orthogonalize((1 - momentum) * gradient + momentum * momentum_buffer)
    direction = direction * math.sqrt(min(m, n)) / direction.norm()
    second_moment = second_moment.clone()
    even = direction.clone()
    if m >= n:
        for i in range(m):
            second_moment[i, 0] = beta2 * second_moment[i, 0] + (1 - beta2) * (direction[i] ** 2).mean()
            even[i] = direction[i] / second_moment[i, 0].sqrt()
    else:
        for j in range(n):
            second_moment[0, j] = beta2 * second_moment[0, j] + (1 - beta2) * (direction[:, j] ** 2).mean()
            even[:, j] = direction[:, j] / second_moment[0, j].sqrt()
    even = even * direction.norm() / even.norm()
    lr = lr * math.sqrt(max(1.0, m / n))
    decayed = torch.where(even * parameter >= 0, parameter * (1 - lr * weight_decay), parameter)
    return decayed - lr * even, momentum_buffer, second_moment


@settings(deadline=None, max_examples=25)
@given(SHAPES, st.integers(0, 1000))
def test_orthogonalize_applies_the_polynomials_to_the_singular_values(shape: tuple[int, int, int], seed: int) -> None:
    torch.manual_seed(seed)
    update = torch.randn(shape)
    expected = torch.stack([naive_orthogonalize(matrix) for matrix in update])
    torch.testing.assert_close(orthogonalize(update, torch.float32).double(), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("shape", [(96, 32), (32, 96), (64, 16)])
@pytest.mark.parametrize("work_dtype", [torch.float32, torch.bfloat16])
def test_orthogonalize_comes_near_the_nearest_orthogonal_matrix(
    shape: tuple[int, int], work_dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    update = torch.nn.functional.normalize(torch.randn(2, *shape), dim=-1)
    u, _, vh = torch.linalg.svd(update, full_matrices=False)
    result = orthogonalize(update, work_dtype).float()
    assert torch.linalg.svdvals(result).sub(1).abs().max() < 0.16
    cosine = torch.nn.functional.cosine_similarity(result.flatten(1), (u @ vh).flatten(1))
    assert cosine.min() > 0.99


@settings(deadline=None, max_examples=20)
@given(st.floats(-12, 12))
def test_orthogonalize_does_not_depend_on_the_scale_of_the_gradient(exponent: float) -> None:
    torch.manual_seed(0)
    update = torch.randn(2, 7, 5)
    scaled = orthogonalize(update * 10**exponent, torch.float32)
    torch.testing.assert_close(scaled, orthogonalize(update, torch.float32), rtol=0, atol=1e-4)


@pytest.mark.parametrize("scale", [0.0, 1e-45, 1e-30, 1e-20, 1e-16, 1e-15])
def test_gradients_too_small_to_mean_anything_do_no_harm(scale: float) -> None:
    update = torch.full((1, 6, 4), scale)
    update[0, 0, 0] = -scale
    assert torch.linalg.svdvals(orthogonalize(update, torch.float32)).max() < 1.15


def test_dead_rows_stay_dead_and_the_others_are_orthogonalised() -> None:
    torch.manual_seed(0)
    update = torch.randn(1, 12, 4)
    update[:, 5] = 0
    result = orthogonalize(update, torch.float32)
    assert result[:, 5].eq(0).all()
    assert torch.linalg.svdvals(result).min() > 0.85


@settings(deadline=None, max_examples=25)
@given(SHAPES, st.integers(0, 1000))
def test_the_update_has_the_norm_of_an_orthogonal_matrix(shape: tuple[int, int, int], seed: int) -> None:
    torch.manual_seed(seed)
    direction = torch.randn(shape)
    second_moment = torch.rand(shape[0], *second_moment_shape(*shape[1:]))
    norms = (direction * variance_scale(direction, second_moment, 0.1)).norm(dim=(-2, -1))
    torch.testing.assert_close(norms, torch.full_like(norms, math.sqrt(min(shape[1:]))))


@settings(deadline=None, max_examples=25)
@given(SHAPES, st.integers(0, 1000), st.floats(0, 0.97), st.floats(0, 0.5))
def test_several_updates_match_the_papers_computed_naively(
    shape: tuple[int, int, int], seed: int, momentum: float, weight_decay: float
) -> None:
    torch.manual_seed(seed)
    num_matrices, m, n = shape
    parameters, momenta = torch.randn(shape), torch.zeros(shape)
    second_moments = torch.zeros(num_matrices, *second_moment_shape(m, n))
    naive = [tuple(t[k].double() for t in (parameters, momenta, second_moments)) for k in range(num_matrices)]
    for _ in range(3):
        gradients = torch.randn(shape)
        naive = [
            naive_muon_update(state[0], gradient.double(), state[1], state[2], 0.02, momentum, 0.9, weight_decay)
            for state, gradient in zip(naive, gradients, strict=True)
        ]
        muon_update(
            parameters,
            gradients,
            momenta,
            second_moments,
            is_finite=TAKEN,
            lr=0.02,
            momentum=momentum,
            beta2=0.9,
            weight_decay=weight_decay,
            work_dtype=torch.float32,
        )
    for index, tensors in enumerate((parameters, momenta, second_moments)):
        expected = torch.stack([state[index] for state in naive])
        torch.testing.assert_close(tensors.double(), expected, rtol=1e-3, atol=1e-3)


def test_weight_decay_shrinks_only_weights_that_the_update_shrinks_too() -> None:
    torch.manual_seed(0)
    weights = torch.randn(2, 8, 8)
    gradients = torch.randn(2, 8, 8)
    after = {}
    for weight_decay in (0.0, 0.5):
        after[weight_decay] = weights.clone()
        muon_update(
            after[weight_decay],
            gradients.clone(),
            torch.zeros(2, 8, 8),
            torch.zeros(2, 8, 1),
            is_finite=TAKEN,
            lr=0.1,
            momentum=0.9,
            beta2=0.9,
            weight_decay=weight_decay,
            work_dtype=torch.float32,
        )
    update = weights - after[0.0]
    shrinks = update * weights >= 0
    decay = after[0.0] - after[0.5]
    assert 0.2 < shrinks.float().mean() < 0.8
    torch.testing.assert_close(decay[shrinks], (0.1 * 0.5 * weights)[shrinks])
    torch.testing.assert_close(decay[~shrinks], torch.zeros_like(decay[~shrinks]))


@pytest.mark.parametrize("shape", [(2, 6, 4), (2, 4, 6)])
@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30, 1.0])
def test_a_skipped_update_changes_not_one_bit_whatever_the_gradients(
    bad: float, begun: bool, shape: tuple[int, int, int]
) -> None:
    torch.manual_seed(0)
    state = [torch.randn(shape), torch.zeros(shape), torch.zeros(2, *second_moment_shape(*shape[1:]))]
    values = {"lr": 0.1, "momentum": 0.95, "beta2": 0.9, "weight_decay": 0.3, "work_dtype": torch.float32}
    if begun:
        muon_update(state[0], torch.randn(shape), *state[1:], is_finite=TAKEN, **values)
    before = [tensor.clone() for tensor in state]
    gradients = torch.randn(shape)
    gradients[0, 1] = bad
    muon_update(state[0], gradients, *state[1:], is_finite=torch.tensor(False), **values)
    assert all(map(torch.equal, state, before))


def test_one_compiled_graph_serves_every_step_of_a_schedule() -> None:
    num_graphs = 0

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        nonlocal num_graphs
        num_graphs += 1
        return graph

    torch.manual_seed(0)
    torch._dynamo.reset()
    compiled = torch.compile(muon_update, backend=count, dynamic=False, fullgraph=True)
    gradients = torch.randn(3, 2, 6, 4)
    states = [[torch.ones(2, 6, 4), torch.zeros(2, 6, 4), torch.zeros(2, *second_moment_shape(6, 4))] for _ in range(2)]
    for step, gradient in enumerate(gradients):
        values = {"lr": 0.02 / (step + 1), "momentum": 0.85 + 0.01 * step, "beta2": 0.9, "weight_decay": 0.1}
        for state, function in zip(states, (muon_update, compiled), strict=True):
            scalars = {
                name: value if function is muon_update else torch.tensor(value) for name, value in values.items()
            }
            # The second step is skipped.
            is_finite = torch.tensor(step != 1)
            function(state[0], gradient, *state[1:], is_finite=is_finite, **scalars, work_dtype=torch.float32)
    assert num_graphs == 1
    torch.testing.assert_close(states[0], states[1])

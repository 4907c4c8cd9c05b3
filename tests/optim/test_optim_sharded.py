"""The sharded optimizer against slow plain ones, and against itself at other world sizes."""

import zlib
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from distributed import run_distributed
from nanochat.errors import DataError
from nanochat.optim import (
    AdamWGroup,
    MuonGroup,
    ParameterGroup,
    ScheduleConfig,
    ShardedOptimizer,
    check_coverage,
    schedule_at,
)
from nanochat.optim.muon import muon_update, second_moment_shape
from nanochat.optim.optimizer import cut_muon
from nanochat.runtime import form_nodes

# Nothing divides: 5 matrices, odd sizes, tensors of fewer elements than there are ranks.
MATRIX_SHAPES = [(6, 4)] * 5 + [(4, 6)] * 2 + [(3, 5)]
EMBEDDING_SHAPES = [(11, 3), (37,), (1, 1)]
SCALAR_SHAPES = [(2,), ()]

# Every world size below divides it, so each averages the same gradients in its own way.
NUM_LANES = 84
NUM_STEPS = 6
SCHEDULE = ScheduleConfig(warmup_steps=2, momentum_warmup_steps=3)

Weights = dict[str, Tensor]


def make_groups(seed: int) -> list[ParameterGroup]:
    generator = torch.Generator().manual_seed(seed)

    def parameters(prefix: str, shapes: list[Any]) -> dict[str, nn.Parameter]:
        return {
            f"{prefix}.{index}": nn.Parameter(torch.randn(shape, generator=generator))
            for index, shape in enumerate(shapes)
        }

    return [
        AdamWGroup("scalars", parameters("scalar", SCALAR_SHAPES), lr=0.1, betas=(0.96, 0.95)),
        AdamWGroup("embeddings", parameters("wte", EMBEDDING_SHAPES), lr=0.05, weight_decay=0.1),
        MuonGroup("matrices", parameters("h", MATRIX_SHAPES), lr=0.05, weight_decay=0.2),
    ]


def named_parameters(groups: list[ParameterGroup]) -> dict[str, nn.Parameter]:
    return {name: parameter for group in groups for name, parameter in group.parameters.items()}


def lane_gradients(name: str, shape: torch.Size, step: int) -> Tensor:
    """One gradient per lane: [lanes, *shape]."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {step}".encode()))
    return torch.randn(NUM_LANES, *shape, generator=generator)


def backward(groups: list[ParameterGroup], step: int, rank: int, world_size: int) -> None:
    """Accumulate, in two backward passes, the mean of this rank's lanes."""
    for name, parameter in named_parameters(groups).items():
        own_lanes = lane_gradients(name, parameter.shape, step)[rank::world_size]
        for lanes in own_lanes.chunk(2):
            (parameter * lanes.sum(0) / len(own_lanes)).sum().backward()


def clone(groups: list[ParameterGroup]) -> Weights:
    return {name: parameter.detach().clone() for name, parameter in named_parameters(groups).items()}


def train(
    first_step: int = 0,
    last_step: int = NUM_STEPS,
    weights: Weights | None = None,
    state: dict[str, Tensor] | None = None,
) -> tuple[Weights, list[Tensor], dict[str, Tensor]]:
    """Train on whatever ranks there are; returns the weights, the gradient norms and the whole state."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    # Ranks begin differently on purpose: the optimizer gives them the weights of rank 0.
    groups = make_groups(seed=rank)
    optimizer = ShardedOptimizer(groups)
    if weights is not None and state is not None:
        with torch.no_grad():
            for name, parameter in named_parameters(groups).items():
                parameter.copy_(weights[name])
        optimizer.load_state_dict(state)
    norms = []
    for step in range(first_step, last_step):
        optimizer.zero_gradients()
        backward(groups, step, rank, world_size)
        norms.append(optimizer.reduce_gradients())
        optimizer.step(schedule_at(step, NUM_STEPS, SCHEDULE))
    return clone(groups), norms, optimizer.state_dict()


def reference_step(
    groups: list[ParameterGroup], weights: Weights, gradients: Weights, state: dict[str, Any], step: int
) -> None:
    """Each parameter by itself, by torch.optim.AdamW or a stack of one matrix."""
    schedule = schedule_at(step, NUM_STEPS, SCHEDULE)
    for group in groups:
        for name in group.parameters:
            weight, gradient = weights[name], gradients[name].clone()
            if isinstance(group, AdamWGroup):
                if name not in state:
                    state[name] = torch.optim.AdamW(
                        [weight],
                        betas=group.betas,
                        eps=group.eps,
                        weight_decay=group.weight_decay,
                        foreach=False,
                    )
                weight.grad = gradient
                state[name].param_groups[0]["lr"] = group.lr * schedule.lr_multiplier
                state[name].step()
            elif isinstance(group, MuonGroup):
                if name not in state:
                    second_moment = torch.zeros(1, *second_moment_shape(*weight.shape))
                    state[name] = (torch.zeros(1, *weight.shape), second_moment)
                muon_update(
                    weight[None],
                    gradient[None],
                    *state[name],
                    is_finite=torch.tensor(True),
                    lr=group.lr * schedule.lr_multiplier,
                    momentum=schedule.muon_momentum,
                    beta2=group.beta2,
                    weight_decay=group.weight_decay * schedule.muon_weight_decay_multiplier,
                    work_dtype=torch.float32,
                )


def test_one_rank_does_what_plain_optimizers_do_parameter_by_parameter() -> None:
    weights, norms, _ = train()
    groups = make_groups(seed=0)
    expected, state = clone(groups), {}
    for step in range(NUM_STEPS):
        gradients = {name: lane_gradients(name, value.shape, step).mean(0) for name, value in expected.items()}
        norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
        torch.testing.assert_close(norms[step], norm, rtol=1e-5, atol=0)
        reference_step(groups, expected, gradients, state, step)
    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_any_number_of_ranks_trains_the_same_weights(world_size: int) -> None:
    expected_weights, expected_norms, expected_state = train()
    ranks = run_distributed(train, world_size)
    weights, norms, state = ranks[0]
    torch.testing.assert_close(weights, expected_weights, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norms, expected_norms, rtol=1e-5, atol=0)
    torch.testing.assert_close(state, expected_state, rtol=1e-4, atol=1e-5)
    for other_weights, other_norms, other_state in ranks[1:]:
        torch.testing.assert_close(other_weights, weights, rtol=0, atol=0)
        torch.testing.assert_close(other_norms, norms, rtol=0, atol=0)
        assert other_state == {}


@pytest.mark.parametrize(("saved_at", "resumed_at"), [(1, 3), (3, 2), (2, 1), (3, 3)])
def test_state_saved_at_one_world_size_resumes_at_another(saved_at: int, resumed_at: int) -> None:
    expected_weights, _, expected_state = train()
    weights, _, state = run_distributed(train, saved_at, 0, 4)[0]
    resumed_weights, _, resumed_state = run_distributed(train, resumed_at, 4, NUM_STEPS, weights, state)[0]
    torch.testing.assert_close(resumed_weights, expected_weights, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(resumed_state, expected_state, rtol=1e-4, atol=1e-5)


def test_resuming_at_the_same_world_size_loses_not_one_bit() -> None:
    weights, _, state = train(0, 4)
    torch.testing.assert_close(train(4, NUM_STEPS, weights, state)[::2], train()[::2], rtol=0, atol=0)


def test_state_names_every_slot_of_every_parameter_in_its_own_shape() -> None:
    _, _, state = train()
    assert int(state["step"]) == NUM_STEPS
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    assert shapes["wte.0.exp_avg"] == shapes["wte.0.exp_avg_sq"] == (11, 3)
    assert shapes["scalar.1.exp_avg"] == ()
    assert shapes["h.0.momentum"] == (6, 4)
    assert shapes["h.0.second_moment"] == (6, 1)
    assert shapes["h.5.second_moment"] == (1, 6)
    assert len(state) == 1 + 2 * len(MATRIX_SHAPES + EMBEDDING_SHAPES + SCALAR_SHAPES)


@pytest.mark.parametrize("damage", ["missing", "unknown", "has shape"])
def test_state_that_does_not_fit_is_refused_by_name_and_changes_nothing(damage: str) -> None:
    _, _, state = train()
    if damage == "missing":
        del state["h.3.momentum"]
    elif damage == "unknown":
        state["h.99.momentum"] = torch.zeros(1)
    else:
        state["h.3.momentum"] = torch.zeros(4, 6)
    optimizer = ShardedOptimizer(make_groups(seed=0))
    before = optimizer.state_dict()
    with pytest.raises(DataError, match=rf"h\.\d+\.momentum .*{damage}"):
        optimizer.load_state_dict(state)
    torch.testing.assert_close(optimizer.state_dict(), before, rtol=0, atol=0)


def train_in_small_banks(
    ranks_per_node: int = 0,
    overlaps: bool = True,
    reduce_dtype: torch.dtype = torch.float32,
    last_step: int = NUM_STEPS,
) -> tuple[Weights, list[Tensor], dict[str, Tensor], float]:
    """As `train`, with a bank or several of each shape; also what share of them was sent before the backward ended."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    groups = make_groups(seed=rank)
    optimizer = ShardedOptimizer(
        groups,
        reduce_dtype=reduce_dtype,
        nodes=form_nodes(ranks_per_node) if ranks_per_node else None,
        bank_elements=40,
    )
    norms, sent_early = [], 0
    for step in range(last_step):
        # Two micro-batches in the two halves, of which the first must send nothing.
        for half in range(2):
            if half == 1 and overlaps:
                optimizer.reduce_during_backward()
            loss = torch.zeros(())
            for name, parameter in named_parameters(groups).items():
                own_lanes = lane_gradients(name, parameter.shape, step)[rank::world_size]
                loss = loss + (parameter * own_lanes.chunk(2)[half].sum(0) / len(own_lanes)).sum()
            loss.backward()
            sent = sum(bank._under_way is not None for bank in optimizer._banks)
            assert half == 1 or sent == 0
            sent_early += sent
        norms.append(optimizer.reduce_gradients())
        optimizer.step(schedule_at(step, NUM_STEPS, SCHEDULE))
        assert all(parameter.grad.eq(0).all() for parameter in named_parameters(groups).values())
    return clone(groups), norms, optimizer.state_dict(), sent_early / len(optimizer._banks) / last_step


def assert_ranks_agree(ranks: list[Any]) -> None:
    for weights, norms, *_ in ranks[1:]:
        torch.testing.assert_close((weights, norms), tuple(ranks[0][:2]), rtol=0, atol=0)


@pytest.mark.parametrize(("world_size", "ranks_per_node"), [(2, 0), (3, 0), (4, 2), (6, 3), (6, 2)])
def test_banks_that_travel_during_the_backward_give_the_same_bits(world_size: int, ranks_per_node: int) -> None:
    overlapping = run_distributed(train_in_small_banks, world_size, ranks_per_node)
    waiting = run_distributed(train_in_small_banks, world_size, ranks_per_node, False)
    assert_ranks_agree(overlapping)
    torch.testing.assert_close(overlapping[0][:3], waiting[0][:3], rtol=0, atol=0)
    assert [sent for *_, sent in waiting] == [0] * world_size
    # All banks, in all steps but the first, in which the order is learnt.
    assert [sent for *_, sent in overlapping] == [pytest.approx((NUM_STEPS - 1) / NUM_STEPS)] * world_size


@pytest.mark.parametrize(("world_size", "ranks_per_node"), [(4, 0), (4, 2), (6, 2), (6, 3)])
def test_nodes_of_several_ranks_train_the_same_weights(world_size: int, ranks_per_node: int) -> None:
    ranks = run_distributed(train_in_small_banks, world_size, ranks_per_node)
    assert_ranks_agree(ranks)
    weights, norms, state, _ = ranks[0]
    expected_weights, expected_norms, expected_state = train()
    torch.testing.assert_close(weights, expected_weights, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norms, expected_norms, rtol=1e-5, atol=0)
    torch.testing.assert_close(state, expected_state, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("resumed_at", [1, 3])
def test_state_saved_by_two_nodes_of_two_resumes_at_another_world_size(resumed_at: int) -> None:
    weights, _, state, _ = run_distributed(train_in_small_banks, 4, 2, True, torch.float32, 4)[0]
    resumed_weights, _, resumed_state = run_distributed(train, resumed_at, 4, NUM_STEPS, weights, state)[0]
    expected_weights, _, expected_state = train()
    torch.testing.assert_close(resumed_weights, expected_weights, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(resumed_state, expected_state, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("world_size", "ranks_per_node"), [(2, 0), (4, 2)])
def test_gradients_that_travel_in_bfloat16_differ_by_its_rounding_and_weights_by_nothing(
    world_size: int, ranks_per_node: int
) -> None:
    ranks = run_distributed(train_in_small_banks, world_size, ranks_per_node, True, torch.bfloat16, 1)
    assert_ranks_agree(ranks)
    _, norms, state, _ = ranks[0]
    _, expected_norms, expected_state = train(0, 1)
    torch.testing.assert_close(norms, expected_norms, rtol=2**-8, atol=0)
    assert not torch.equal(norms[0], expected_norms[0])
    for name in ("h.0.momentum", "wte.0.exp_avg"):
        gradient, expected = state[name], expected_state[name]
        # Each rank's value and each sum is rounded, to 8 bits of the larger of them.
        torch.testing.assert_close(gradient, expected, rtol=2**-7, atol=2**-6 * float(expected.abs().max()))


def train_with_a_parameter_that_the_loss_leaves_out() -> Weights:
    torch.manual_seed(0)
    model = Bigram()
    optimizer = ShardedOptimizer(model.groups(), bank_elements=1)
    for step in range(3):
        optimizer.reduce_during_backward()
        # The head alone, then all, then all but the embedding.
        hidden = torch.ones(16, 8) if step != 1 else model.wte(torch.arange(16))
        (model.lm_head(model.c_fc(hidden) if step else hidden).square().sum()).backward()
        optimizer.reduce_gradients()
        optimizer.step(schedule_at(step, NUM_STEPS, SCHEDULE))
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_a_parameter_without_a_gradient_holds_nobody_up() -> None:
    first, second = run_distributed(train_with_a_parameter_that_the_loss_leaves_out, 2)
    torch.testing.assert_close(second, first, rtol=0, atol=0)


class FailsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("no more")


def fail_once_and_carry_on(fails: bool) -> Weights:
    torch.manual_seed(0)
    model = Bigram()
    optimizer = ShardedOptimizer(model.groups(), bank_elements=1)
    for step in range(3):
        if fails and step == 2:
            optimizer.reduce_during_backward()
            hidden = model.wte(torch.arange(16))
            with pytest.raises(torch.OutOfMemoryError):
                model.lm_head(FailsInBackward.apply(model.c_fc(hidden))).square().sum().backward()
            assert any(bank._under_way is not None for bank in optimizer._banks)
            optimizer.zero_gradients()
            assert not any(bank._under_way is not None for bank in optimizer._banks)
        optimizer.reduce_during_backward()
        model.loss(torch.arange(16), torch.arange(16).roll(5)).backward()
        optimizer.reduce_gradients()
        optimizer.step(schedule_at(step, NUM_STEPS, SCHEDULE))
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_a_backward_that_failed_leaves_nothing_under_way() -> None:
    expected = run_distributed(fail_once_and_carry_on, 2, False)
    torch.testing.assert_close(run_distributed(fail_once_and_carry_on, 2, True), expected, rtol=0, atol=0)


def send_too_early() -> None:
    model = Bigram()
    optimizer = ShardedOptimizer(model.groups(), bank_elements=1)
    optimizer.reduce_during_backward()
    model.lm_head(torch.ones(8)).sum().backward()
    with pytest.raises(RuntimeError, match=r"a gradient of lm_head\.weight came after"):
        model.lm_head(torch.ones(8)).sum().backward()


def test_a_gradient_that_comes_after_its_bank_was_sent_is_noticed() -> None:
    run_distributed(send_too_early, 2)


@given(
    shapes=st.lists(st.sampled_from([(2, 3), (3, 2), (8, 8)]), min_size=1, max_size=40),
    world_size=st.integers(1, 9),
    bank_elements=st.integers(1, 2000),
)
def test_cutting_matrices_into_banks_costs_no_padding(
    shapes: list[tuple[int, int]], world_size: int, bank_elements: int
) -> None:
    parameters = {f"h.{index}": nn.Parameter(torch.empty(shape)) for index, shape in enumerate(shapes)}
    banks = cut_muon(parameters, world_size, bank_elements)
    assert sorted(name for bank in banks for name in bank) == sorted(parameters)
    for shape in set(shapes):
        of_shape = [bank for bank in banks if next(iter(bank.values())).shape == shape]
        per_rank = {-(-len(bank) // world_size) for bank in of_shape}
        assert len(per_rank) == 1, "Muon is compiled once per number of matrices"
        assert len(of_shape) * max(per_rank) == -(-shapes.count(shape) // world_size)
        if world_size == 1:
            assert len(of_shape) == 1


def skip_a_step() -> tuple[bool, Weights, Weights, dict[str, Tensor], dict[str, Tensor]]:
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    groups = make_groups(seed=0)
    optimizer = ShardedOptimizer(groups)
    backward(groups, 0, rank, world_size)
    optimizer.reduce_gradients()
    optimizer.step(schedule_at(0, NUM_STEPS, SCHEDULE))
    optimizer.zero_gradients()
    before, state_before = clone(groups), optimizer.state_dict()
    backward(groups, 1, rank, world_size)
    if rank == world_size - 1:
        (groups[2].parameters["h.0"] * float("nan")).sum().backward()
    is_finite = optimizer.reduce_gradients().isfinite()
    optimizer.step(schedule_at(1, NUM_STEPS, SCHEDULE), is_finite)
    optimizer.zero_gradients()
    assert all(parameter.grad.eq(0).all() for parameter in named_parameters(groups).values())
    return bool(is_finite), before, clone(groups), state_before, optimizer.state_dict()


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_gradient_that_is_not_finite_on_one_rank_is_seen_by_all_and_skipped(world_size: int) -> None:
    for is_finite, before, after, state_before, state_after in run_distributed(skip_a_step, world_size):
        assert not is_finite
        torch.testing.assert_close(after, before, rtol=0, atol=0)
        torch.testing.assert_close(state_after, state_before, rtol=0, atol=0)


@settings(deadline=None, max_examples=25)
@given(
    matrix_shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=6),
    other_shapes=st.lists(st.lists(st.integers(1, 9), max_size=3), min_size=1, max_size=6),
)
def test_any_shapes_train_and_round_trip_through_the_state(
    matrix_shapes: list[tuple[int, int]], other_shapes: list[list[int]]
) -> None:
    torch.manual_seed(0)
    others = {f"o{index}": nn.Parameter(torch.randn(shape)) for index, shape in enumerate(other_shapes)}
    matrices = {f"m{index}": nn.Parameter(torch.randn(shape)) for index, shape in enumerate(matrix_shapes)}
    groups: list[ParameterGroup] = [AdamWGroup("others", others, lr=0.1)]
    if matrices:
        groups.append(MuonGroup("matrices", matrices, lr=0.1))
    expected = clone(groups)
    optimizer = ShardedOptimizer(groups)
    for name, parameter in named_parameters(groups).items():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=0, atol=0)
    gradients = {name: torch.randn_like(value) for name, value in expected.items()}
    for name, parameter in named_parameters(groups).items():
        (parameter * gradients[name]).sum().backward()
    optimizer.reduce_gradients()
    optimizer.step(schedule_at(0, NUM_STEPS, SCHEDULE))
    reference_step(groups, expected, gradients, {}, 0)
    torch.testing.assert_close(clone(groups), expected, rtol=1e-4, atol=1e-5)

    state = optimizer.state_dict()
    other = ShardedOptimizer(groups)
    other.load_state_dict(state)
    torch.testing.assert_close(other.state_dict(), state, rtol=0, atol=0)


class Bigram(nn.Module):
    """The smallest language model with an embedding, a matrix and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(16, 8)
        self.c_fc = nn.Linear(8, 8, bias=False)
        self.lm_head = nn.Linear(8, 16, bias=False)

    def groups(self) -> list[ParameterGroup]:
        named = dict(self.named_parameters())
        matrices = {"c_fc.weight": named.pop("c_fc.weight")}
        return [AdamWGroup("rest", named, lr=0.03), MuonGroup("matrices", matrices, lr=0.02)]

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        logits = self.lm_head(self.c_fc(self.wte(inputs)).relu().square())
        return nn.functional.cross_entropy(logits, targets)


def test_a_model_learns_and_keeps_its_state_dict() -> None:
    torch.manual_seed(0)
    model = Bigram()
    optimizer = ShardedOptimizer(model.groups())
    inputs = torch.arange(16)
    targets = inputs.roll(5)
    first_loss = model.loss(inputs, targets).detach()
    for step in range(60):
        optimizer.zero_gradients()
        model.loss(inputs, targets).backward()
        optimizer.reduce_gradients()
        optimizer.step(schedule_at(step, 60, ScheduleConfig(warmup_steps=5)))
    last_loss = model.loss(inputs, targets).detach()
    assert last_loss < 0.1 < 2 < first_loss

    copy = Bigram()
    copy.load_state_dict(model.state_dict())
    torch.testing.assert_close(copy.loss(inputs, targets).detach(), last_loss, rtol=0, atol=0)


def test_weights_loaded_into_the_model_are_those_that_are_trained() -> None:
    model = Bigram()
    optimizer = ShardedOptimizer(model.groups())
    loaded = Bigram().state_dict()
    model.load_state_dict(loaded)
    model.loss(torch.arange(16), torch.arange(16)).backward()
    optimizer.reduce_gradients()
    optimizer.step(schedule_at(100, 1000, ScheduleConfig()))
    for name, parameter in model.named_parameters():
        assert 0 < (parameter.detach() - loaded[name]).abs().max() < 0.1


def test_every_trainable_parameter_must_be_in_exactly_one_group() -> None:
    model = Bigram()
    rest, matrices = model.groups()
    check_coverage(model, [rest, matrices])
    with pytest.raises(ValueError, match=r"^c_fc\.weight: in no group$"):
        check_coverage(model, [rest])
    with pytest.raises(ValueError, match=r"^c_fc\.weight: in more than one group$"):
        check_coverage(model, [rest, matrices, matrices])
    stranger = AdamWGroup("more", {"ghost": nn.Parameter(torch.zeros(1))}, lr=1)
    with pytest.raises(ValueError, match=r"^ghost: not a trainable parameter of the model$"):
        check_coverage(model, [rest, matrices, stranger])
    model.c_fc.weight.requires_grad_(False)
    check_coverage(model, [rest])


@pytest.mark.parametrize(
    ("groups", "complaint"),
    [
        ([AdamWGroup("a", {}, lr=1)], "group a has no parameters"),
        ([AdamWGroup("a", {"x": nn.Parameter(torch.zeros(2).half())}, lr=1)], "x in group a must be .* fp32"),
        (
            [AdamWGroup("a", {"x": nn.Parameter(torch.zeros(2), False)}, lr=1)],
            "x in group a must be a trainable",
        ),
        ([MuonGroup("m", {"x": nn.Parameter(torch.zeros(2))}, lr=1)], r"x in Muon group m is not a matrix"),
        (
            [AdamWGroup(name, {"x": nn.Parameter(torch.zeros(2))}, lr=1) for name in ("a", "b")],
            "two parameters have the same name",
        ),
        ([ParameterGroup("p", {"x": nn.Parameter(torch.zeros(2))}, lr=1)], "p is neither"),
    ],
)
def test_groups_that_cannot_be_trained_are_refused(groups: list[ParameterGroup], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        ShardedOptimizer(groups)


def test_a_parameter_in_two_groups_is_refused() -> None:
    shared = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="y is also in a group as x"):
        ShardedOptimizer([AdamWGroup("a", {"x": shared}, lr=1), AdamWGroup("b", {"y": shared}, lr=1)])


def test_gradients_that_left_their_bank_are_noticed() -> None:
    model = Bigram()
    optimizer = ShardedOptimizer(model.groups())
    model.zero_grad(set_to_none=True)
    with pytest.raises(RuntimeError, match=r"wte\.weight\.grad was replaced"):
        optimizer.reduce_gradients()


def test_parameters_that_left_their_bank_are_noticed() -> None:
    model = Bigram()
    optimizer = ShardedOptimizer(model.groups())
    model.lm_head.weight.data = model.lm_head.weight.data.clone()
    with pytest.raises(RuntimeError, match=r"lm_head\.weight was moved"):
        optimizer.reduce_gradients()


def test_a_step_needs_reduced_gradients_each_time() -> None:
    optimizer = ShardedOptimizer(make_groups(seed=0))
    schedule = schedule_at(0, NUM_STEPS, SCHEDULE)
    with pytest.raises(RuntimeError, match="reduce_gradients"):
        optimizer.step(schedule)
    optimizer.reduce_gradients()
    optimizer.step(schedule)
    with pytest.raises(RuntimeError, match="reduce_gradients"):
        optimizer.step(schedule)

"""The scaling rules give the reference its reference values, and follow the horizon that is run."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.config import TrainBaseConfig, model_from_depth
from nanochat.errors import UsageError
from nanochat.model.gpt import GPT
from nanochat.model.size import flops_per_token, parameter_counts
from nanochat.optim.optimizer import check_coverage
from nanochat.training.groups import parameter_groups
from nanochat.training.recipe import REFERENCE_BATCH_TOKENS, make_recipe

D12 = model_from_depth(12, 32768, 2048)
D4 = model_from_depth(4, 512, 64, head_dim=32, aspect_ratio=16)


def test_the_reference_run_is_left_as_it_was_tuned() -> None:
    recipe = make_recipe(TrainBaseConfig(depth=12), D12, dataset_tokens=10**12)
    assert recipe.total_batch_size == REFERENCE_BATCH_TOKENS
    assert recipe.lr_scale == 1
    assert recipe.weight_decay == pytest.approx(0.28, rel=1e-3)
    assert recipe.total_tokens == pytest.approx(12 * parameter_counts(D12)["scaling"], rel=1e-3)
    assert recipe.warmup_steps == 40


def test_a_longer_horizon_gets_a_larger_batch_and_less_decay() -> None:
    short = make_recipe(TrainBaseConfig(depth=12), D12, 10**12)
    long = make_recipe(TrainBaseConfig(depth=12, data_param_ratio=120), D12, 10**12)
    assert long.total_batch_size > short.total_batch_size
    assert long.weight_decay < short.weight_decay


def test_every_way_to_set_a_horizon_is_the_horizon_that_is_run() -> None:
    tokens_per_step = 64 * 64
    by_steps = make_recipe(TrainBaseConfig(num_steps=10, total_batch_size=tokens_per_step), D4, 10**6)
    assert by_steps.total_tokens == 10 * tokens_per_step
    flops = flops_per_token(D4) * 20 * tokens_per_step
    by_flops = make_recipe(TrainBaseConfig(target_flops=flops, total_batch_size=tokens_per_step), D4, 10**6)
    assert by_flops.num_steps == 20
    by_epochs = make_recipe(TrainBaseConfig(target_epochs=2.0, total_batch_size=tokens_per_step), D4, 10**6)
    assert by_epochs.num_steps == 2 * 10**6 // tokens_per_step


@settings(deadline=None, max_examples=20)
@given(ratio=st.floats(2, 400))
def test_a_horizon_in_steps_chooses_the_batch_of_the_same_horizon_in_tokens(ratio: float) -> None:
    by_ratio = make_recipe(TrainBaseConfig(depth=12, data_param_ratio=ratio), D12, 10**12)
    by_steps = make_recipe(TrainBaseConfig(depth=12, num_steps=by_ratio.num_steps), D12, 10**12)
    # Both are rounded to a power of two, so they can end on either side of a boundary.
    assert by_steps.total_batch_size / by_ratio.total_batch_size in (0.5, 1, 2)


@settings(deadline=None, max_examples=50)
@given(ratio=st.floats(0.5, 500))
def test_the_batch_is_always_a_whole_number_of_rows(ratio: float) -> None:
    recipe = make_recipe(TrainBaseConfig(data_param_ratio=ratio), D4, 10**6)
    assert recipe.total_batch_size % D4.sequence_len == 0
    assert recipe.num_steps >= 1


def test_a_batch_that_is_not_whole_rows_is_refused_with_one_that_is() -> None:
    with pytest.raises(UsageError, match="--total-batch-size 192"):
        make_recipe(TrainBaseConfig(num_steps=1, total_batch_size=200), D4, 10**6)


def test_a_horizon_without_a_step_is_refused() -> None:
    with pytest.raises(UsageError, match="nothing would be trained"):
        make_recipe(TrainBaseConfig(target_epochs=0.001, total_batch_size=4096), D4, 10**6)


def test_unscaled_hyperparameters_are_used_as_given() -> None:
    recipe = make_recipe(TrainBaseConfig(num_steps=5, scale_hyperparameters=False, weight_decay=0.1), D4, 10**6)
    assert (recipe.lr_scale, recipe.weight_decay) == (1.0, 0.1)


@pytest.mark.parametrize("variant", ["modern", "classic"])
def test_every_parameter_is_in_exactly_one_group(variant: str) -> None:
    config = TrainBaseConfig(num_steps=5)
    shape = model_from_depth(3, 512, 64, head_dim=32, aspect_ratio=16, variant=variant)  # type: ignore[arg-type]
    model = GPT(shape)
    model.init_weights()
    groups = parameter_groups(model, config, make_recipe(config, shape, 10**6))
    check_coverage(model, groups)
    assert sum(len(group.parameters) for group in groups) == len(list(model.parameters()))


@settings(deadline=None, max_examples=30)
@given(rows=st.sampled_from([16, 32, 64, 128, 256, 512, 1024]), ratio=st.floats(4, 400))
def test_the_averaging_time_is_that_of_the_reference(rows: int, ratio: float) -> None:
    """B / (η λ D), in units of the reference, is 1 for any batch and horizon that the rules were fitted for."""
    config = TrainBaseConfig(depth=12, data_param_ratio=ratio, total_batch_size=rows * 2048)
    recipe = make_recipe(config, D12, 10**12)
    horizon = recipe.total_tokens / (12 * parameter_counts(D12)["scaling"])
    batch = recipe.total_batch_size / REFERENCE_BATCH_TOKENS
    assert batch / (recipe.lr_scale * recipe.weight_decay / 0.28 * horizon) == pytest.approx(1, rel=1e-6)

"""One dial derives a model, and numbers that cannot be trained with are refused with the flag to change."""

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.config import TrainBaseConfig, TrainSFTConfig, model_from_depth
from nanochat.errors import UsageError


@given(depth=st.integers(1, 64), aspect=st.integers(1, 128), head_dim=st.sampled_from([32, 64, 128]))
def test_every_depth_gives_whole_heads_and_at_least_the_width_asked_for(depth: int, aspect: int, head_dim: int) -> None:
    model = model_from_depth(depth, 1024, 256, aspect_ratio=aspect, head_dim=head_dim)
    assert model.n_embd == model.n_head * head_dim
    assert depth * aspect <= model.n_embd < depth * aspect + head_dim


def test_windows_follow_the_pattern_and_the_last_layer_sees_everything() -> None:
    assert model_from_depth(6, 1024, 2048).windows == (512, 512, 512, 2048, 512, 2048)
    assert model_from_depth(2, 1024, 100).windows == (100, 100)
    assert set(model_from_depth(6, 1024, 2048, variant="classic").windows) == {2048}


def test_value_embeddings_alternate_and_end_on_the_last_layer() -> None:
    model = model_from_depth(5, 1024, 256)
    assert [model.has_value_embedding(layer) for layer in range(5)] == [True, False, True, False, True]
    classic = model_from_depth(5, 1024, 256, variant="classic")
    assert not any(classic.has_value_embedding(layer) for layer in range(5))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_steps": 10, "target_epochs": 1.0}, "--num-steps and --target-epochs each set the horizon"),
        ({"num_steps": 0}, "would train nothing"),
        ({"target_flops": -1.0}, "would train nothing"),
        ({"keep_checkpoints": 1}, "--keep-checkpoints 2 or more"),
        ({"seed": -1}, "--seed a number from 0"),
        ({"seed": 10**20}, "--seed a number from 0"),
        ({"lanes": 0}, "--lanes 1 or more"),
    ],
)
def test_settings_that_cannot_train_are_refused(flags: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TrainBaseConfig(**flags)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [math.nan, -1.0, math.inf])
@pytest.mark.parametrize(
    ("config", "name"),
    [
        *(
            (TrainBaseConfig, name)
            for name in (
                "embedding_lr",
                "unembedding_lr",
                "matrix_lr",
                "scalar_lr",
                "weight_decay",
                "warmdown_ratio",
                "final_lr_fraction",
                "stall_minutes",
                "target_flops",
                "target_epochs",
                "data_param_ratio",
            )
        ),
        *(
            (TrainSFTConfig, name)
            for name in ("lr_fraction", "batch_fraction", "weight_decay", "warmdown_ratio", "target_epochs")
        ),
    ],
)
def test_no_rate_share_or_horizon_is_negative_or_infinite_or_no_number(
    config: Callable[..., object], name: str, value: float
) -> None:
    with pytest.raises(UsageError, match=rf"^--{name.replace('_', '-')} is {value}"):
        config(**{name: value})


def test_rates_of_zero_freeze_and_are_allowed() -> None:
    TrainBaseConfig(embedding_lr=0.0, weight_decay=0.0, warmdown_ratio=0.0, final_lr_fraction=1.0, stall_minutes=0.0)
    with pytest.raises(UsageError, match=r"^--warmdown-ratio is 1.5 — give --warmdown-ratio a number of 0 to 1$"):
        TrainBaseConfig(warmdown_ratio=1.5)


@pytest.mark.parametrize("change", [{"num_kv_heads": 4}, {"window_pattern": "SX"}, {"window_pattern": ""}])
def test_shapes_that_cannot_be_built_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        model_from_depth(6, 1024, 256, **change)  # type: ignore[arg-type]

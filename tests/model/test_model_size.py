"""Counts from the shape alone are those of the network that is built."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.config import ModelConfig, model_from_depth
from nanochat.model.gpt import GPT, Linear, part_of
from nanochat.model.size import flops_per_token, parameter_counts


@st.composite
def shapes(draw: st.DrawFn) -> ModelConfig:
    kv_heads, sharing = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return ModelConfig(
        vocab_size=draw(st.integers(1, 999)),
        sequence_len=draw(st.integers(1, 999)),
        n_layer=draw(st.integers(1, 7)),
        n_head=kv_heads * sharing,
        n_kv_head=kv_heads,
        n_embd=kv_heads * sharing * draw(st.sampled_from([24, 32])),
        window_pattern=draw(st.sampled_from(["L", "SL", "SSSL"])),
        variant=draw(st.sampled_from(["modern", "classic"])),
    )


@given(shapes())
@settings(max_examples=40, deadline=None)
def test_every_parameter_of_any_shape_is_counted_in_its_part(shape: ModelConfig) -> None:
    with torch.device("meta"):
        model = GPT(shape)
    built: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        built[part_of(name)] = built.get(part_of(name), 0) + parameter.numel()
    counts = parameter_counts(shape)
    assert {part: count for part, count in counts.items() if part not in ("total", "scaling") and count} == built
    assert counts["total"] == sum(built.values())
    weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, Linear))
    attention = 12 * shape.n_embd * sum(block.attn.window for block in model.blocks)
    assert flops_per_token(shape) == 6 * weights + attention


@pytest.mark.parametrize(
    ("depth", "total", "value_embeds", "gigaflops"),
    # From the architecture's description, worked out by hand for T = 2048 and V = 32768 (12 d² L + V d and so on).
    [(12, 286e6, 151e6, 0.760), (20, 897e6, 419e6, 2.886), (24, 1384e6, 604e6, 4.775)],
)
def test_counts_and_flops_are_those_of_the_architecture(
    depth: int, total: float, value_embeds: float, gigaflops: float
) -> None:
    shape = model_from_depth(depth, 32768, 2048)
    counts = parameter_counts(shape)
    assert counts["total"] == pytest.approx(total, rel=2e-3)
    assert counts["value_embeds"] == pytest.approx(value_embeds, rel=2e-3)
    assert flops_per_token(shape) / 1e9 == pytest.approx(gigaflops, rel=2e-3)

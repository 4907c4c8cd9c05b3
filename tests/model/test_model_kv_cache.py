"""The cache changes the cost of a token, never its logits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from models import CONTEXT, random_model
from nanochat.config import Variant
from nanochat.model.gpt import GPT
from nanochat.model.kv_cache import KVCache

VARIANTS: tuple[Variant, ...] = ("modern", "classic")
MODELS = {(variant, window): random_model(variant, window=window) for variant in VARIANTS for window in (1, 5, 24)}
TOKENS = st.integers(0, 100)


def logits_without_cache(model: GPT, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens]))[0, -1]


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(list(MODELS)),
    rows=st.lists(st.lists(TOKENS, min_size=1, max_size=CONTEXT), min_size=1, max_size=4),
    data=st.data(),
)
def test_rows_of_any_lengths_in_pieces_of_any_size_have_the_logits_of_each_row_alone(
    kind: tuple[Variant, int], rows: list[list[int]], data: st.DataObject
) -> None:
    model = MODELS[kind]
    cache, seen = KVCache(model.config, len(rows)), [0] * len(rows)
    while rows:
        pieces = [
            row[start : start + data.draw(st.integers(1, len(row) - start))]
            for row, start in zip(rows, seen, strict=True)
        ]
        logits = model.next_logits(cache.append(pieces))
        seen = [start + len(piece) for start, piece in zip(seen, pieces, strict=True)]
        assert cache.lengths == seen
        for row, end, found in zip(rows, seen, logits, strict=True):
            assert_close(found, logits_without_cache(model, row[:end]), atol=1e-4, rtol=1e-4)
        # Rows that are all seen leave, and the others change places.
        alive = data.draw(st.permutations([place for place, row in enumerate(rows) if seen[place] < len(row)]))
        cache.select(alive)
        rows, seen = [rows[place] for place in alive], [seen[place] for place in alive]


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_these_tests_compare_depends_on_every_token_seen(variant: Variant) -> None:
    """Else a cache could forget and nobody would know."""
    model = MODELS[variant, 5]
    tokens = list(range(CONTEXT))
    before = logits_without_cache(model, tokens)
    for place in range(CONTEXT):
        changed = [*tokens[:place], 50, *tokens[place + 1 :]]
        assert not torch.allclose(before, logits_without_cache(model, changed), atol=1e-3)


def test_a_full_cache_refuses_before_anything_is_written() -> None:
    model = MODELS["modern", 5]
    cache = KVCache(model.config, 2, capacity=8)
    model.next_logits(cache.append([[1, 2, 3, 4, 5], [6]]))
    before = [tensor.clone() for tensor in (*cache.keys, *cache.values, cache.last_embedding_BC)]
    with pytest.raises(ValueError, match="a row of 9 tokens does not fit a cache of 8"):
        cache.append([[1, 2, 3, 4], [5]])
    assert cache.lengths == [5, 1]
    for tensor, old in zip((*cache.keys, *cache.values, cache.last_embedding_BC), before, strict=True):
        assert torch.equal(tensor, old)


@pytest.mark.parametrize("rows", [[[1]], [[1], []], [[1], [2], [3]]])
def test_each_row_of_the_cache_gets_at_least_one_token(rows: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="a cache of 2 rows"):
        KVCache(MODELS["classic", 5].config, 2).append(rows)


def test_a_cache_is_never_longer_than_the_context() -> None:
    assert KVCache(MODELS["classic", 5].config, 1, capacity=1000).capacity == CONTEXT


def test_a_row_sees_no_padding_even_if_what_it_left_behind_is_huge() -> None:
    model = MODELS["modern", 24]
    cache = KVCache(model.config, 2)
    model.next_logits(cache.append([[1, 2, 3, 4, 5, 6], [7]]))
    for tensor in (*cache.keys, *cache.values):
        tensor[1, 1:] = 1e6
    logits = model.next_logits(cache.append([[8], [9]]))
    assert_close(logits[1], logits_without_cache(model, [7, 9]), atol=1e-4, rtol=1e-4)

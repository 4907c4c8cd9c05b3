"""The cache changes the cost of a token, never its logits."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from models import CONTEXT, random_model
from nanochat.config import Variant, model_from_depth
from nanochat.model.gpt import GPT
from nanochat.model.inference import InferenceModel
from nanochat.model.kv_cache import KVCache, Token
from nanochat.model.loss import softcap

VARIANTS: tuple[Variant, ...] = ("modern", "classic")
MODELS = {(variant, window): random_model(variant, window=window) for variant in VARIANTS for window in (1, 5, 24)}
NETWORKS = {kind: InferenceModel(model) for kind, model in MODELS.items()}
TOKENS = st.integers(0, 100)
ROWS = st.lists(st.lists(TOKENS, min_size=1, max_size=CONTEXT), min_size=1, max_size=4)


def logits_without_cache(model: GPT, tokens: Sequence[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens]))[0, -1]


def append(network: InferenceModel, cache: KVCache, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    return softcap(network.next_logits(cache.append(rows)))


def step(network: InferenceModel, cache: KVCache, tokens: Sequence[int]) -> torch.Tensor:
    logits = softcap(network.next_logits(Token(cache, torch.tensor(tokens)[:, None])))
    cache.lengths = [length + 1 for length in cache.lengths]
    return logits


def assert_same_logits(kind: tuple[Variant, int], found: torch.Tensor, text: Sequence[int]) -> None:
    assert_close(found, logits_without_cache(MODELS[kind], text), atol=1e-4, rtol=1e-4)


@settings(deadline=None, max_examples=60)
@given(kind=st.sampled_from(list(MODELS)), rows=ROWS, data=st.data())
def test_rows_of_any_lengths_in_pieces_of_any_size_have_the_logits_of_each_row_alone(
    kind: tuple[Variant, int], rows: list[list[int]], data: st.DataObject
) -> None:
    network = NETWORKS[kind]
    cache, seen = network.new_cache(len(rows)), [0] * len(rows)
    while rows:
        left = [len(row) - start for row, start in zip(rows, seen, strict=True)]
        # A row must have begun before it is fed single tokens.
        if all(seen) and data.draw(st.booleans()):
            counts = [1] * len(rows)
            logits = step(network, cache, [row[start] for row, start in zip(rows, seen, strict=True)])
        else:
            counts = [data.draw(st.integers(0, count)) for count in left]
            counts[0] = max(counts[0], 1)
            pieces = [row[start:][:count] for row, start, count in zip(rows, seen, counts, strict=True)]
            logits = append(network, cache, pieces)
        seen = [start + count for start, count in zip(seen, counts, strict=True)]
        assert cache.lengths == seen
        # A row that a step has filled to the brim stays at its last position: it may be stepped on until it is dropped.
        assert [min(place, CONTEXT - 1) for place in cache.positions_B.tolist()] == [min(n, CONTEXT - 1) for n in seen]
        for row, end, count, found in zip(rows, seen, counts, logits, strict=True):
            if count:
                assert_same_logits(kind, found, row[:end])
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


@settings(deadline=None, max_examples=40)
@given(kind=st.sampled_from(list(MODELS)), data=st.data())
def test_a_cache_goes_back_to_a_beginning_of_its_text_or_says_that_it_cannot(
    kind: tuple[Variant, int], data: st.DataObject
) -> None:
    network = NETWORKS[kind]
    text = data.draw(st.lists(TOKENS, min_size=2, max_size=CONTEXT - 2))
    cache = network.new_cache(1)
    append(network, cache, [text[:2]])
    for token in text[2:]:
        step(network, cache, [token])
    beginning = data.draw(st.integers(0, len(text)))
    # One token more than the window is kept, so one step may be taken back whatever the length.
    assert cache.can_return_to(beginning) == (beginning == 0 or len(text) <= max(kind[1], beginning) + 1)
    if cache.can_return_to(beginning):
        cache.return_to(text[:beginning])
        other = [*text[:beginning], 7, 8]
        assert_same_logits(kind, append(network, cache, [[7, 8]])[0], other)


@pytest.mark.parametrize("kind", MODELS)
def test_a_text_that_is_copied_to_several_rows_is_there_in_each(kind: tuple[Variant, int]) -> None:
    network, text = NETWORKS[kind], [5, 6, 7, 8, 9, 10, 11]
    cache = network.new_cache(1)
    append(network, cache, [text])
    cache.select([0, 0, 0])
    for row, found in enumerate(append(network, cache, [[1], [2, 3], [4]])):
        assert_same_logits(kind, found, [*text, *[[1], [2, 3], [4]][row]])


def test_a_pass_that_is_broken_off_leaves_an_empty_cache() -> None:
    network = NETWORKS["modern", 5]
    cache = network.new_cache(1)
    append(network, cache, [[1, 2, 3]])
    cache.append([[4, 5, 6, 7, 8, 9]])
    assert not any(cache.can_return_to(length) for length in range(1, 4))
    cache.return_to([])
    assert_same_logits(("modern", 5), append(network, cache, [[9, 8, 7]])[0], [9, 8, 7])


def test_a_full_cache_refuses_before_anything_is_written() -> None:
    network = NETWORKS["modern", 5]
    cache = network.new_cache(2, capacity=8)
    append(network, cache, [[1, 2, 3, 4, 5], [6]])
    before = [tensor.clone() for tensor in (*cache.keys, *cache.values, cache.previous_B, cache.positions_B)]
    with pytest.raises(ValueError, match="a row of 9 tokens does not fit a cache of 8"):
        cache.append([[1, 2, 3, 4], [5]])
    assert cache.lengths == [5, 1]
    for tensor, old in zip((*cache.keys, *cache.values, cache.previous_B, cache.positions_B), before, strict=True):
        assert torch.equal(tensor, old)


@pytest.mark.parametrize("rows", [[[1]], [[], []], [[1], [2], [3]]])
def test_what_is_appended_is_a_token_at_least_and_of_the_rows_of_the_cache(rows: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="a cache of 2 rows"):
        KVCache(MODELS["classic", 5].config, 2).append(rows)


def test_a_cache_is_never_longer_than_the_context() -> None:
    assert KVCache(MODELS["classic", 5].config, 1, capacity=1000).capacity == CONTEXT


def test_a_layer_with_a_window_takes_memory_for_the_window_only() -> None:
    shape = model_from_depth(4, vocab_size=300, sequence_len=2048)
    assert shape.windows == (512, 512, 512, 2048)
    assert [keys.size(1) for keys in KVCache(shape, 1).keys] == [514, 514, 514, 2049]
    assert [keys.size(1) for keys in KVCache(shape, 1, capacity=100).keys] == [101] * 4


def test_a_row_sees_no_padding_even_if_what_it_left_behind_is_huge() -> None:
    network = NETWORKS["modern", 24]
    cache = network.new_cache(2)
    append(network, cache, [[1, 2, 3, 4, 5, 6], [7]])
    for tensor in (*cache.keys, *cache.values):
        tensor[1, 1:] = 1e6
    assert_same_logits(("modern", 24), step(network, cache, [8, 9])[1], [7, 9])
    for tensor in (*cache.keys, *cache.values):
        tensor[1, 2:] = 1e6
    assert_same_logits(("modern", 24), append(network, cache, [[8], [9, 10]])[1], [7, 9, 9, 10])

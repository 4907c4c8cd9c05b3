"""Generation with a cache says what generation without one says, however the work is cut, and does no work in vain."""

import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scripts import AFTER_CALL, CALL, successors, tokens_of, watch_passes

from models import CONTEXT, random_model, scripted_model
from nanochat.chat.engine import STOP_TOKENS, Engine, Sampling, choose_tokens
from nanochat.config import Variant
from nanochat.errors import UsageError
from nanochat.model.generate import generate
from nanochat.model.kv_cache import Token
from nanochat.model.loss import softcap
from nanochat.tokenizer.tokenizer import Tokenizer

VOCAB_SIZE = 320
VARIANTS: tuple[Variant, ...] = ("modern", "classic")
MODELS = {variant: random_model(variant, VOCAB_SIZE, window=5) for variant in VARIANTS}
PROMPTS = st.lists(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=CONTEXT), min_size=1, max_size=6)


@settings(deadline=None, max_examples=40)
@given(
    variant=st.sampled_from(VARIANTS),
    prompts=PROMPTS,
    max_new_tokens=st.integers(1, 15),
    batch_size=st.integers(1, 6),
    chunk=st.sampled_from([1, 2, 7, 512]),
    runs_ahead=st.booleans(),
)
def test_the_likeliest_tokens_are_those_of_the_model_without_a_cache_for_any_batch_and_chunk(
    tokenizer: Tokenizer,
    variant: Variant,
    prompts: list[list[int]],
    max_new_tokens: int,
    batch_size: int,
    chunk: int,
    runs_ahead: bool,
) -> None:
    stop = frozenset(map(tokenizer.special_id, STOP_TOKENS))
    expected = [
        generate(MODELS[variant], prompt, min(max_new_tokens, CONTEXT - len(prompt)), stop=stop) for prompt in prompts
    ]
    engine = Engine(MODELS[variant], tokenizer, calculator=False, prefill_chunk=chunk)
    engine.runs_ahead = runs_ahead
    assert engine.generate(prompts, Sampling(max_new_tokens), batch_size) == expected


@settings(deadline=None, max_examples=20)
@given(
    variant=st.sampled_from(VARIANTS),
    prompts=PROMPTS,
    seed=st.integers(0, 9),
    batch_size=st.integers(1, 6),
    chunk=st.integers(1, 9),
    runs_ahead=st.booleans(),
)
def test_what_is_drawn_depends_on_seed_and_prompt_and_not_on_the_batch(
    tokenizer: Tokenizer,
    variant: Variant,
    prompts: list[list[int]],
    seed: int,
    batch_size: int,
    chunk: int,
    runs_ahead: bool,
) -> None:
    sampling = Sampling(10, temperature=1.0, top_k=30, seed=seed)
    whole = Engine(MODELS[variant], tokenizer).generate(prompts, sampling, batch_size=len(prompts))
    engine = Engine(MODELS[variant], tokenizer, prefill_chunk=chunk)
    engine.runs_ahead = runs_ahead
    assert engine.generate(prompts, sampling, batch_size) == whole
    assert list(engine.stream(prompts[0], sampling)) == whole[0]


def test_seeds_and_rows_draw_differently_and_no_global_generator_is_touched(tokenizer: Tokenizer) -> None:
    engine, state = Engine(MODELS["modern"], tokenizer), torch.get_rng_state()
    answers = [
        tuple(answer) for seed in (0, 1) for answer in engine.generate([[5]] * 4, Sampling(12, 1.0, None, seed), 2)
    ]
    assert len(set(answers)) == 8
    assert torch.equal(torch.get_rng_state(), state)


def test_an_answer_ends_where_the_context_does(tokenizer: Tokenizer) -> None:
    model = scripted_model({1: 2, 2: 1}, VOCAB_SIZE, sequence_len=16)
    answers = Engine(model, tokenizer).generate([[1] * 10, [1] * 16, [1] * 15], Sampling(100))
    assert answers == [[2, 1, 2, 1, 2, 1], [], [2]]


@pytest.mark.parametrize("stop", STOP_TOKENS)
def test_a_stop_token_ends_an_answer_and_is_not_part_of_it(stop: str, tokenizer: Tokenizer) -> None:
    model = scripted_model({1: 2, 2: 3, 3: tokenizer.special_id(stop)}, VOCAB_SIZE)
    assert Engine(model, tokenizer).generate([[1], [3], [2]], Sampling()) == [[2, 3], [], [3]]


def test_no_pass_is_made_after_the_last_token_and_none_for_rows_that_have_ended(tokenizer: Tokenizer) -> None:
    end = tokenizer.special_id("<|assistant_end|>")
    model = scripted_model({1: 2, 2: 3, 3: 4, 4: end, 5: 5}, VOCAB_SIZE)
    engine = Engine(model, tokenizer)
    passes = watch_passes(engine)
    answers = engine.generate([[5], [4], [2], [1]], Sampling(5))
    assert answers == [[5] * 5, [], [3, 4], [2, 3, 4]]
    # Row by row they take 5, 1, 3 and 4 passes.
    assert [rows for rows, _ in passes] == [4, 3, 3, 2, 1]


def test_a_long_prompt_is_computed_in_chunks(tokenizer: Tokenizer) -> None:
    model = scripted_model({1: 2}, VOCAB_SIZE)
    engine = Engine(model, tokenizer, prefill_chunk=8)
    passes = watch_passes(engine)
    assert engine.generate([[1] * 20], Sampling(1)) == [[2]]
    assert passes == [(1, 8), (1, 8), (1, 4)]


def test_what_all_prompts_begin_with_is_computed_once(tokenizer: Tokenizer) -> None:
    model = scripted_model({1: 2, 2: 3, 3: 1}, VOCAB_SIZE)
    shared = [1, 2] * 20
    engine = Engine(model, tokenizer)
    passes = watch_passes(engine)
    answers = engine.generate([[*shared, 1], [*shared, 2, 3], shared], Sampling(2))
    assert answers == [[2, 3], [1, 2], [3, 1]]
    # Of the shortest prompt one token is left, after which it is continued.
    assert passes == [(1, 39), (3, 3), (3, 1)]


@settings(deadline=None, max_examples=20)
@given(
    variant=st.sampled_from(VARIANTS),
    turns=st.lists(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=8), min_size=1, max_size=4),
    kept=st.integers(0, CONTEXT),
    heard=st.integers(0, 5),
    runs_ahead=st.booleans(),
)
def test_a_text_that_goes_on_is_answered_as_if_it_were_new(
    tokenizer: Tokenizer, variant: Variant, turns: list[list[int]], kept: int, heard: int, runs_ahead: bool
) -> None:
    engine, text = Engine(MODELS[variant], tokenizer), list[int]()
    engine.runs_ahead = runs_ahead
    for turn in turns:
        # Somebody may have cut or changed what was there before.
        text = [*text[:kept], *turn][:CONTEXT]
        sampling = Sampling(6, temperature=0.5)
        expected = Engine(MODELS[variant], tokenizer).generate([text], sampling)[0]
        stream = engine.stream(text, sampling)
        # Nor need anybody listen to the end.
        said = list(itertools.islice(stream, heard))
        stream.close()  # type: ignore[attr-defined]
        assert said == expected[:heard]
        text += said


def test_the_turns_before_are_not_computed_again(tokenizer: Tokenizer) -> None:
    engine = Engine(scripted_model({1: 2, 2: 3, 3: 1}, VOCAB_SIZE), tokenizer)
    passes = watch_passes(engine)
    text = [1, 2, 3, 1]
    text += engine.stream(text, Sampling(3))
    assert passes == [(1, 4), (1, 1), (1, 1)]
    # The last token of an answer has not been fed.
    assert list(engine.stream([*text, 5, 1], Sampling(1))) == [2]
    assert passes[3:] == [(1, 3)]


def test_two_streams_at_once_do_not_share_what_they_remember(tokenizer: Tokenizer) -> None:
    engine = Engine(scripted_model({1: 2, 2: 3, 3: 1, 5: 6, 6: 5}, VOCAB_SIZE), tokenizer)
    pairs = zip(engine.stream([1], Sampling(4)), engine.stream([5], Sampling(4)), strict=True)
    assert list(pairs) == [(2, 6), (3, 5), (1, 6), (2, 5)]


@pytest.mark.parametrize("runs_ahead", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_calculator_answers_a_call_in_the_models_place(
    dtype: torch.dtype, runs_ahead: bool, tokenizer: Tokenizer
) -> None:
    model = scripted_model(successors(tokenizer, CALL, AFTER_CALL), VOCAB_SIZE, compute_dtype=dtype)
    start, *call = tokens_of(tokenizer, *CALL)
    expected = [
        *call,
        *[tokenizer.special_id("<|output_start|>"), *tokenizer.encode("42"), tokenizer.special_id("<|output_end|>")],
        *tokens_of(tokenizer, "fine."),
    ]
    engine = Engine(model, tokenizer)
    engine.runs_ahead = runs_ahead
    assert list(engine.stream([start], Sampling())) == expected
    # Also among rows that are elsewhere at that time, and as far as there is room.
    prompts = [[start], [*call, start], tokens_of(tokenizer, "f")]
    assert engine.generate(prompts, Sampling()) == [expected, expected, tokens_of(tokenizer, "ine.")]
    for room in range(1, len(expected) + 2):
        assert engine.generate([[start]], Sampling(room)) == [expected[:room]]


def test_without_the_calculator_or_where_it_refuses_the_model_goes_on_by_itself(tokenizer: Tokenizer) -> None:
    for expression, calculator in [("6*7", False), ("6/0", True)]:
        script = (*CALL[:2], expression, CALL[3], "ok", "<|assistant_end|>")
        model = scripted_model(successors(tokenizer, script), VOCAB_SIZE)
        start, *answer, _ = tokens_of(tokenizer, *script)
        assert Engine(model, tokenizer, calculator=calculator).generate([[start]], Sampling()) == [answer]


def test_an_end_without_a_start_of_its_own_is_no_call(tokenizer: Tokenizer) -> None:
    again = ("<|output_end|>", "<|python_end|>", "ok", "<|assistant_end|>")
    model = scripted_model(successors(tokenizer, CALL, again), VOCAB_SIZE)
    prompts = [tokens_of(tokenizer, start) for start in ("7", CALL[0])]
    without_start, after_a_call = Engine(model, tokenizer).generate(prompts, Sampling())
    assert without_start == tokens_of(tokenizer, "<|python_end|>", "ok")
    assert after_a_call[-4:] == tokens_of(tokenizer, *again[:3])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_on_a_gpu_the_answers_are_those_of_a_cpu(temperature: float, tokenizer: Tokenizer) -> None:
    model = random_model(vocab_size=VOCAB_SIZE, window=5)
    prompts, sampling = [[1], [2, 3, 4], [5] * 10], Sampling(12, temperature, seed=1)
    expected = Engine(model, tokenizer).generate(prompts, sampling)
    engine = Engine(model.cuda(), tokenizer)
    assert engine.generate(prompts, sampling) == expected
    assert [list(engine.stream(prompts[0], sampling)) for _ in range(2)] == [expected[0]] * 2


@pytest.mark.parametrize("prompt", [[], [1] * (CONTEXT + 1)])
def test_a_prompt_that_cannot_be_continued_is_refused(prompt: list[int], tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=f"a prompt of {len(prompt)} tokens"):
        Engine(MODELS["modern"], tokenizer).generate([[1], prompt], Sampling())


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"max_new_tokens": 0}, "--max-new-tokens"),
        ({"temperature": -0.1}, "--temperature"),
        ({"temperature": math.nan}, "--temperature"),
        ({"top_k": 0}, "--top-k"),
    ],
)
def test_a_way_to_choose_that_is_none_is_refused(settings: dict[str, float], flag: str) -> None:
    with pytest.raises(UsageError, match=flag):
        Sampling(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_as_often_as_their_probability_says(temperature: float) -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 1.5])
    draws = 5000
    numbers = torch.rand(draws, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    counts = Counter(choose_tokens(Sampling(1, temperature, top_k=3), logits.expand(draws, -1), numbers).tolist())
    kept = softcap(logits).where(logits >= 1, -math.inf)
    for token, probability in enumerate(torch.softmax(kept / temperature, dim=0).tolist()):
        # Four standard deviations.
        assert abs(counts[token] / draws - probability) <= 4 * (probability * (1 - probability) / draws) ** 0.5


def test_temperature_0_and_top_1_take_the_likeliest() -> None:
    logits = torch.randn(7, 50, generator=torch.Generator().manual_seed(0))
    likeliest = logits.argmax(dim=1)
    assert torch.equal(choose_tokens(Sampling(), logits, None), likeliest)
    numbers = torch.full((7,), 0.9, dtype=torch.float64)
    assert torch.equal(choose_tokens(Sampling(temperature=9.0, top_k=1), logits, numbers), likeliest)


def test_the_smallest_temperature_takes_the_likeliest_and_nothing_outside_the_vocabulary() -> None:
    logits = torch.randn(7, 50, generator=torch.Generator().manual_seed(0))
    numbers = torch.full((7,), 0.9, dtype=torch.float64)
    assert torch.equal(choose_tokens(Sampling(temperature=1e-308), logits, numbers), logits.argmax(dim=1))


def test_a_step_that_is_broken_off_leaves_nothing_that_the_next_answer_takes_for_whole(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What follows shares all but the last token, whose window reaches back to what the step has overwritten.
    prompt, sampling = list(range(1, 9)), Sampling(8, temperature=1.0)
    engine = Engine(MODELS["modern"], tokenizer, calculator=False)
    finish = Token.finish

    def break_off(step: Token) -> None:
        raise KeyboardInterrupt

    for last in range(200, 230):
        monkeypatch.setattr(Token, "finish", break_off)
        with pytest.raises(KeyboardInterrupt):
            list(engine.stream([*prompt, 300], sampling))
        monkeypatch.setattr(Token, "finish", finish)
        assert [list(engine.stream([*prompt, last], sampling))] == engine.generate([[*prompt, last]], sampling)

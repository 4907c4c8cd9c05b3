"""Multiple choice: the likeliest letter wins, whatever else is in the batch."""

import random
from collections.abc import Sequence

import pytest
import torch
from examinees import byte_tokenizer, question, random_model, saying
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.evaluation.choice import judge_choices
from nanochat.tasks.multiple_choice import multiple_choice
from nanochat.tasks.task import Problem
from nanochat.tokenizer.conversation import render_prompt

TOKENIZER = byte_tokenizer()
MODEL = random_model(TOKENIZER)
problems = st.builds(
    lambda text, letters: question(text, letters[0], sorted(letters)),
    st.text(min_size=1, max_size=200),
    st.lists(st.sampled_from("ABCDEFGH"), min_size=2, max_size=5, unique=True),
)


def chosen_alone(problem: Problem) -> str:
    """The reference: one prompt at a time, all logits."""
    prompt = render_prompt(TOKENIZER, problem.conversation.messages[:-1], MODEL.config.sequence_len)
    logits = MODEL(torch.tensor([prompt]))[0, -1]
    return max(problem.choices, key=lambda choice: logits[TOKENIZER.encode(choice)[0]].item())


@settings(max_examples=40, deadline=None)
@given(st.lists(problems, min_size=1, max_size=6))
def test_it_is_the_likeliest_first_token_alone_and_in_any_batch(batch: Sequence[Problem]) -> None:
    verdicts = judge_choices(MODEL, TOKENIZER, batch)
    assert [verdict.correct for verdict in verdicts] == [chosen_alone(p) == p.answer for p in batch]
    assert [judge_choices(MODEL, TOKENIZER, [problem])[0] for problem in batch] == verdicts


def test_a_question_that_does_not_fit_is_cut_and_says_so() -> None:
    fits, too_long = question("x" * 156, "A", "AB"), question("x" * 157, "A", "AB")
    assert [verdict.cut for verdict in judge_choices(MODEL, TOKENIZER, [fits, too_long])] == [False, True]


def test_a_model_that_says_the_answer_has_all_right_and_one_that_says_another_none() -> None:
    asked = [multiple_choice(f"Which is number {i}?", ["one", "two", "three"], 1) for i in range(5)]
    assert all(verdict.correct for verdict in judge_choices(saying(TOKENIZER, ["B"]), TOKENIZER, asked))
    assert not any(verdict.correct for verdict in judge_choices(saying(TOKENIZER, ["C"]), TOKENIZER, asked))


def test_a_likelier_token_that_is_no_choice_does_not_matter() -> None:
    model = saying(TOKENIZER, ["x"])
    with torch.no_grad():
        model.lm_head.weight[ord("B")] = model.lm_head.weight[ord("x")] / 2
    verdicts = judge_choices(model, TOKENIZER, [multiple_choice("?", ["1", "2", "3"], 1)])
    assert verdicts[0].correct


def test_of_equal_choices_the_first_is_taken() -> None:
    indifferent = saying(TOKENIZER, ["x"])
    asked = [multiple_choice("?", ["1", "2", "3"], index) for index in range(3)]
    assert [verdict.correct for verdict in judge_choices(indifferent, TOKENIZER, asked)] == [True, False, False]


def test_who_knows_nothing_is_as_good_as_chance() -> None:
    draw = random.Random(0)
    asked = [multiple_choice(f"Is it {draw.random()}?", "abcd", draw.randrange(4)) for _ in range(400)]
    correct = sum(verdict.correct for verdict in judge_choices(MODEL, TOKENIZER, asked))
    # Five standard deviations of 400 throws of a die with four sides.
    assert abs(correct - 100) < 5 * (400 * 0.25 * 0.75) ** 0.5


@pytest.mark.parametrize("choices", [("Yes", "You"), ("B", "C")])
def test_choices_that_cannot_be_told_apart_or_lack_the_answer_are_refused(choices: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="cannot be told apart"):
        judge_choices(MODEL, TOKENIZER, [question("?", "Yes" if "Yes" in choices else "A", choices)])

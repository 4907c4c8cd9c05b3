"""A multiple choice reads as it should, and its answer is one of its letters."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.tasks.multiple_choice import multiple_choice


def test_the_letter_follows_its_choice_without_a_space() -> None:
    problem = multiple_choice("Which is a colour?", ["red", "seven", "Rome"], 0)
    assert problem.conversation.messages[0].text == (
        "Multiple Choice question: Which is a colour?\n"
        "- red=A\n"
        "- seven=B\n"
        "- Rome=C\n"
        "\n"
        "Respond only with the letter of the correct answer."
    )
    assert (problem.answer, problem.choices) == ("A", ("A", "B", "C"))


@given(st.lists(st.text(min_size=1), min_size=2, max_size=26), st.data())
def test_the_answer_is_the_letter_of_the_correct_choice(choices: list[str], data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, len(choices) - 1))
    problem = multiple_choice("?", choices, correct)
    assert problem.choices.index(problem.answer) == correct
    assert len(problem.choices) == len(choices)


@pytest.mark.parametrize(("choices", "correct"), [(["one"], 0), (["a"] * 27, 0), (["a", "b"], 2), (["a", "b"], -1)])
def test_what_is_no_multiple_choice_is_refused(choices: list[str], correct: int) -> None:
    with pytest.raises(ValueError, match="choice"):
        multiple_choice("?", choices, correct)

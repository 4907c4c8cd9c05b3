"""Words are spelt and their letters counted right, and no word is both trained on and examined."""

import re

import pytest

from nanochat.tasks.spelling import spelling, words
from nanochat.tasks.task import Problem, Split

TASK = spelling()


def judged(problem: Problem, answer: str) -> bool:
    assert TASK.is_correct is not None
    return TASK.is_correct(problem, answer)


@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_spell_the_word_and_count_the_letter_asked_for(split: Split) -> None:
    counted = 0
    for word, problem in zip(words(split), TASK.problems(split), strict=True):
        question = problem.conversation.messages[0].text
        assert re.search(rf"\b{word}\b", question)
        spelt, *count = problem.answer.split("\n")
        assert spelt == f"{word}:{','.join(word)}"
        if count:
            letter, number = count[0].split(":")
            assert re.search(rf"\b{letter}\b", question)
            assert int(number) == sum(each == letter for each in word)
            counted += 1
    assert 0.4 < counted / len(words(split)) < 0.6


def test_the_splits_share_no_word_and_have_enough_whatever_the_release_of_python() -> None:
    assert len(set(words("test"))) == 400
    assert 3500 <= len(set(words("train"))) <= 4000
    assert not set(words("train")) & set(words("test"))


def test_the_reference_is_right_and_another_word_or_count_is_not() -> None:
    for problem in TASK.problems("test"):
        assert judged(problem, problem.answer)
        assert judged(problem, problem.answer.upper())
        assert not judged(problem, f"{problem.answer}1")
        assert not judged(problem, problem.answer[:-1])
        assert not judged(problem, "")

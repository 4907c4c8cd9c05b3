"""Sums are right, the calculator is called with them, and the test has no sum that was trained on."""

import re

import pytest

from nanochat.tasks.arithmetic import arithmetic, expression_key, expressions
from nanochat.tasks.task import Problem, Split

TASK = arithmetic()


def judged(problem: Problem, answer: str) -> bool:
    assert TASK.is_correct is not None
    return TASK.is_correct(problem, answer)


@pytest.mark.parametrize(("split", "size"), [("train", 4000), ("test", 400)])
def test_the_calculator_is_called_with_what_was_asked_and_gives_the_result(split: Split, size: int) -> None:
    problems = TASK.problems(split)
    assert len(problems) == size
    for problem in problems:
        question, answer = problem.conversation.messages
        found = re.search(r"(\d+) ?([-+*]) ?(\d+)", question.text)
        assert found is not None
        left, operator, right = int(found[1]), found[2], int(found[3])
        result = {"+": left + right, "-": left - right, "*": left * right}[operator]
        assert [(part.kind, part.text) for part in answer.parts] == [
            ("python", f"{left}{operator}{right}"),
            ("python_output", str(result)),
            ("text", str(result)),
        ]


def test_no_expression_is_in_both_splits_even_the_other_way_round() -> None:
    train, test = ({expression_key(each) for each in expressions(split)} for split in ("train", "test"))
    assert not train & test
    assert expression_key((12, "*", 37)) == expression_key((37, "*", 12)) != expression_key((12, "+", 37))


def test_the_last_number_of_an_answer_counts() -> None:
    problem = next(each for each in TASK.problems("test") if each.answer == "13")
    assert judged(problem, "13")
    assert judged(problem, "That makes 13.")
    assert not judged(problem, "13 or 14")
    assert not judged(problem, "3")
    assert not judged(problem, "")


def test_negative_results_keep_their_sign() -> None:
    problem = next(each for each in TASK.problems("train") if each.answer.startswith("-"))
    assert judged(problem, f"= {problem.answer}")
    assert not judged(problem, problem.answer.removeprefix("-"))

"""GSM8K's answers become calls of the calculator, and a result is judged as a number."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.corpus.conversation import Conversation, assistant, user
from nanochat.tasks.gsm8k import answer_parts, gsm8k, result_of
from nanochat.tasks.task import Problem

plain = st.text(alphabet=st.characters(exclude_characters="<>", exclude_categories=["Cs"]))
calls = st.tuples(st.from_regex(r"[0-9.+*/() -]+", fullmatch=True), st.from_regex(r"-?[0-9.]+", fullmatch=True))


@given(st.lists(st.tuples(plain, calls)), plain)
def test_parts_put_together_are_the_answer(steps: list[tuple[str, tuple[str, str]]], end: str) -> None:
    answer = "".join(f"{text}<<{call}={output}>>" for text, (call, output) in steps) + end
    parts = answer_parts(answer)
    marks = {"text": "{}", "python": "<<{}", "python_output": "={}>>"}
    assert "".join(marks[part.kind].format(part.text) for part in parts) == answer
    assert [part.text for part in parts if part.kind == "python"] == [call for _, (call, _) in steps]
    assert all(part.text for part in parts)


def test_a_call_and_its_output_are_parts() -> None:
    parts = [(part.kind, part.text) for part in answer_parts("12*3=<<12*3=36>>36.\n#### 36")]
    assert parts == [("text", "12*3="), ("python", "12*3"), ("python_output", "36"), ("text", "36.\n#### 36")]


@pytest.mark.parametrize(
    "answer", ["#### 42", "####42.", "#### $42", "#### 42.00", "#### 7\nno, wait\n#### 42", "so 7 #### 42 apples"]
)
def test_the_last_marked_number_is_the_result(answer: str) -> None:
    assert result_of(answer) == 42


@pytest.mark.parametrize("answer", ["42", "#### many", "", "#### 42\n####"])
def test_without_a_marked_number_there_is_no_result(answer: str) -> None:
    assert result_of(answer) is None


@given(st.integers(-(10**9), 10**9), st.integers(-(10**9), 10**9))
def test_an_answer_is_right_exactly_if_its_number_is(expected: int, said: int) -> None:
    judge = gsm8k.__globals__["_is_correct"]
    problem = Problem(Conversation((user("?"), assistant(f"It is {said}.\n#### {expected:,}"))))
    assert judge(problem, f"#### {said}.") == (said == expected)
    assert not judge(problem, f"{expected}")

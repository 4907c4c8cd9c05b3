"""Answers in free text: what is judged is what a person would read."""

import re

import pytest
from examinees import byte_tokenizer, question, saying

from nanochat.chat.engine import Engine
from nanochat.evaluation.generative import judge_texts, visible_text
from nanochat.tasks.task import Problem, Task

TOKENIZER = byte_tokenizer()
SPECIAL = TOKENIZER.special_ids


def tokens_of(marked: str) -> list[int]:
    """Tokens of a text in which special tokens are written out."""
    parts = re.split(r"(<\|\w+\|>)", marked)
    return [token for part in parts for token in ([SPECIAL[part]] if part in SPECIAL else TOKENIZER.encode(part))]


@pytest.mark.parametrize(
    ("answer", "visible"),
    [
        ("42", "42"),
        ("It is <|python_start|>6*7<|python_end|><|output_start|>42<|output_end|>42.", "It is 42."),
        ("<|python_start|>6*7<|python_end|>refused", "refused"),
        ("no end <|python_start|>6*7 of 42", "no end "),
        ("a<|user_start|>b<|python_end|>c", "abc"),
        ("<|python_start|>1<|output_start|>2<|output_end|>3<|python_end|>4", "4"),
        ("", ""),
    ],
)
def test_tool_calls_outputs_and_special_tokens_are_not_read(answer: str, visible: str) -> None:
    assert visible_text(TOKENIZER, tokens_of(answer)) == visible


def test_text_that_spells_a_special_token_is_read() -> None:
    assert visible_text(TOKENIZER, TOKENIZER.encode("<|python_start|>")) == "<|python_start|>"


def judge(says: list[str], expected: str, **options: int) -> bool:
    def is_correct(problem: Problem, text: str) -> bool:
        return text == problem.answer

    task = Task("says", "generative", lambda split: [], is_correct)
    engine = Engine(saying(TOKENIZER, says), TOKENIZER)
    # Of different lengths, so that they are padded.
    asked = [question("What?" * (1 + i), expected) for i in range(3)]
    verdicts = {verdict.correct for verdict in judge_texts(engine, task, asked, options.get("max_new_tokens", 20))}
    assert len(verdicts) == 1
    return verdicts.pop()


def test_the_right_answer_is_right_and_any_other_is_wrong() -> None:
    assert judge(["cat"], "cat")
    assert not judge(["car"], "cat")


def test_what_the_calculator_says_is_computed_but_not_read() -> None:
    says = ["<|python_start|>", "6*7", "<|python_end|>", "<|output_start|>"]
    engine = Engine(saying(TOKENIZER, [*says[:3], "<|output_end|>", "ok"]), TOKENIZER)
    seen: list[str] = []

    def is_correct(problem: Problem, text: str) -> bool:
        seen.append(text)
        return True

    judge_texts(engine, Task("tool", "generative", lambda split: [], is_correct), [question("?", "ok")], 30)
    assert seen == ["ok"]


def test_an_answer_ends_at_the_limit() -> None:
    assert judge(["abcdef"], "abc", max_new_tokens=3)
    assert not judge(["abcdef"], "abc", max_new_tokens=4)


def test_a_question_leaves_room_for_the_answer_and_is_cut_at_most_to_half_the_context() -> None:
    task = Task("long", "generative", lambda split: [], lambda problem, text: text == "cat")
    engine = Engine(saying(TOKENIZER, ["cat"]), TOKENIZER)
    for max_new_tokens, room in ((60, 100), (150, 80)):
        # BOS, the user's start and end, and the assistant's start.
        asked = [question("x" * (room - 4), "cat"), question("x" * (room - 3), "cat")]
        verdicts = judge_texts(engine, task, asked, max_new_tokens)
        assert [(verdict.correct, verdict.cut) for verdict in verdicts] == [(True, False), (True, True)]


def test_a_task_without_a_judge_is_refused() -> None:
    engine = Engine(saying(TOKENIZER, ["a"]), TOKENIZER)
    with pytest.raises(ValueError, match="no way to judge"):
        judge_texts(engine, Task("mute", "generative", lambda split: []), [question("?", "a")], 5)

"""GSM8K: word problems of primary school, solved step by step with the calculator.

https://huggingface.co/datasets/openai/gsm8k (Cobbe et al. 2021, https://arxiv.org/abs/2110.14168). In its answers
`<<12*3=36>>` is a call of the calculator and what it gave, and `#### 36` is the result.
"""

import re
from decimal import Decimal
from pathlib import Path
from typing import Any

from nanochat.corpus.conversation import Conversation, Message, Part, user
from nanochat.tasks.hub import HubDataset
from nanochat.tasks.numerals import numbers_in
from nanochat.tasks.task import Problem, Task

VERSION = 1
DATASET = HubDataset(
    "gsm8k",
    "openai/gsm8k",
    {"train": ("main/train-*.parquet",), "test": ("main/test-*.parquet",)},
    ("question", "answer"),
)

CALL = re.compile(r"<<([^<>]+)=([^<>=]+)>>")
RESULT_MARK = "####"


def gsm8k(task_data: Path) -> Task:
    """Word problems; an answer is right if the number after its last `####` is."""
    return Task(
        "gsm8k", "generative", lambda split: DATASET.problems(task_data, split, _problem), is_correct=_is_correct
    )


def answer_parts(answer: str) -> tuple[Part, ...]:
    """An answer's texts, calls of the calculator and what it gave."""
    parts: list[Part] = []
    # `split` alternates: text, the two groups of a call, text, …
    texts = CALL.split(answer)
    for text, call, output in zip(texts[::3], [*texts[1::3], ""], [*texts[2::3], ""]):
        parts += [Part("text", text), Part("python", call), Part("python_output", output)]
    return tuple(part for part in parts if part.text)


def result_of(answer: str) -> Decimal | None:
    """The number that an answer ends on: the first after its last `####`; `None` without one."""
    _, mark, result = answer.rpartition(RESULT_MARK)
    return next(iter(numbers_in(result)), None) if mark else None


def _problem(row: Any) -> Problem:
    if result_of(row["answer"]) is None:
        raise ValueError(f"its answer has no number after {RESULT_MARK}")
    return Problem(Conversation((user(row["question"]), Message("assistant", answer_parts(row["answer"])))))


def _is_correct(problem: Problem, answer: str) -> bool:
    return result_of(answer) == result_of(problem.answer)

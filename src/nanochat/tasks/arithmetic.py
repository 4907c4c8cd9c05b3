"""Small sums and products, answered with the calculator: what calling a tool looks like, at its simplest."""

from collections.abc import Iterator, Sequence
from typing import Literal

from nanochat.corpus.conversation import Conversation, Part, assistant, user
from nanochat.tasks.numerals import last_number
from nanochat.tasks.splits import MAX_TEST_PROBLEMS, pick, split_by_key
from nanochat.tasks.task import Problem, Split, Task

VERSION = 1
TRAIN_PROBLEMS = 4000

Operator = Literal["+", "-", "*"]
LARGEST: dict[Operator, int] = {"+": 99, "-": 99, "*": 30}

PHRASINGS = (
    "What is {left} {operator} {right}?",
    "What's {left}{operator}{right}?",
    "Calculate {left} {operator} {right}.",
    "{left} {operator} {right} = ?",
    "How much is {left} {operator} {right}?",
    "Can you work out {left} {operator} {right} for me?",
)


def arithmetic() -> Task:
    """Additions, subtractions and multiplications of small whole numbers."""
    return Task("arithmetic", "generative", _problems, is_correct=_is_correct)


def expressions(split: Split) -> list[tuple[int, Operator, int]]:
    """What is calculated in one split: no two numbers under one operator, either way round, are in both."""
    limit = MAX_TEST_PROBLEMS if split == "test" else TRAIN_PROBLEMS
    return split_by_key(_all_expressions(), expression_key, split)[:limit]


def expression_key(expression: tuple[int, Operator, int]) -> str:
    """The same for 12*37 and 37*12: who knows one knows the other."""
    left, operator, right = expression
    return f"{operator} {min(left, right)} {max(left, right)}"


def _all_expressions() -> Iterator[tuple[int, Operator, int]]:
    for operator, largest in LARGEST.items():
        numbers = range(largest + 1)
        yield from ((left, operator, right) for left in numbers for right in numbers)


def _problems(split: Split) -> Sequence[Problem]:
    return [_problem(*expression) for expression in expressions(split)]


def _problem(left: int, operator: Operator, right: int) -> Problem:
    call = f"{left}{operator}{right}"
    results = {"+": left + right, "-": left - right, "*": left * right}
    result = str(results[operator])
    question = pick(PHRASINGS, call).format(left=left, operator=operator, right=right)
    answer = assistant(Part("python", call), Part("python_output", result), result)
    return Problem(Conversation((user(question), answer)))


def _is_correct(problem: Problem, answer: str) -> bool:
    return last_number(answer) == last_number(problem.answer)

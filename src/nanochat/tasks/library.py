"""Questions about Python's standard library: the offline stand-in for a set of real conversations."""

from collections.abc import Sequence

from nanochat.corpus.conversation import Conversation, assistant, user
from nanochat.tasks.library_objects import split_objects
from nanochat.tasks.splits import MAX_TEST_PROBLEMS, pick
from nanochat.tasks.task import Problem, Split, Task

VERSION = 1

PHRASINGS = (
    "What does `{name}` do?",
    "What is `{name}`?",
    "What is `{name}` for?",
    "Explain `{name}`.",
    "Tell me about `{name}` in Python.",
    "Describe `{name}` in a sentence or two.",
)


def library() -> Task:
    """What an object of the standard library does, answered with the first sentences of its documentation."""
    return Task("library", "talk", _problems)


def _problems(split: Split) -> Sequence[Problem]:
    problems = [
        Problem(Conversation((user(pick(PHRASINGS, item.name).format(name=item.name)), assistant(item.summary))))
        for item in split_objects(split)
        if item.summary
    ]
    return problems[:MAX_TEST_PROBLEMS] if split == "test" else problems

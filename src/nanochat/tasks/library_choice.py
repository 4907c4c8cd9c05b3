"""Multiple choice over Python's standard library: the offline stand-ins for MMLU and ARC.

Both are answered from the name alone, by the customs of Python that the built-in corpus is full of. So a model of a few
million parameters can show that it learnt to answer with the letter of what it knows; facts would be beyond it.
"""

import itertools
from collections.abc import Sequence
from typing import get_args

from nanochat.tasks.library_objects import LibraryObject, ObjectKind, library_objects, split_objects
from nanochat.tasks.multiple_choice import multiple_choice
from nanochat.tasks.splits import MAX_TEST_PROBLEMS, pick, shuffled
from nanochat.tasks.task import Problem, Split, Task

KINDS_VERSION = 1
MODULES_VERSION = 1

KINDS: tuple[ObjectKind, ...] = get_args(ObjectKind)
KIND_QUESTIONS = ("What is `{name}` in Python?", "What kind of object is `{name}`?", "`{name}` is a")
NUM_MODULE_CHOICES = 4
MODULE_QUESTIONS = ("Which module does `{name}` belong to?", "Where does `{name}` come from?", "`{name}` is part of")


def library_kinds() -> Task:
    """Whether a name is a module, a class, a function or a method; in the test each is as frequent as the others."""
    return Task("library-kinds", "choice", _kind_problems, chance=1 / len(KINDS))


def library_modules() -> Task:
    """Which of four modules an object belongs to."""
    return Task("library-modules", "choice", _module_problems, chance=1 / NUM_MODULE_CHOICES)


def kind_objects(split: Split) -> list[LibraryObject]:
    """What is asked about in one split."""
    objects = [item for item in split_objects(split) if item.kind]
    if split == "train":
        return objects
    # Were most of them methods, always answering "method" would beat the chance of guessing.
    by_kind = [[item for item in objects if item.kind == kind] for kind in KINDS]
    fewest = min(map(len, by_kind))
    each = min(fewest, MAX_TEST_PROBLEMS // len(KINDS))
    return list(itertools.chain.from_iterable(zip(*(items[:each] for items in by_kind))))


def module_objects(split: Split) -> list[LibraryObject]:
    """What is asked about in one split: what stands in a module directly or in a class of it."""
    objects = [item for item in split_objects(split) if item.module]
    return objects[:MAX_TEST_PROBLEMS] if split == "test" else objects


def _kind_problems(split: Split) -> Sequence[Problem]:
    return [
        multiple_choice(
            pick(KIND_QUESTIONS, item.name).format(name=item.name),
            [f"a {kind}" for kind in KINDS],
            KINDS.index(item.kind),
        )
        for item in kind_objects(split)
        if item.kind
    ]


def _module_problems(split: Split) -> Sequence[Problem]:
    modules = sorted({item.module for item in library_objects() if item.module})
    return [_module_problem(item.name, item.module, modules) for item in module_objects(split) if item.module]


def _module_problem(name: str, module: str, modules: Sequence[str]) -> Problem:
    # A package is not wrong as an answer for what its modules hold, so none is offered beside them.
    wrong: list[str] = []
    for attempt in itertools.count():
        other = pick(modules, name, str(attempt))
        related = f"{module}.".startswith(f"{other}.") or f"{other}.".startswith(f"{module}.")
        if not related and other not in wrong:
            wrong.append(other)
        if len(wrong) == NUM_MODULE_CHOICES - 1:
            break
    choices = shuffled([module, *wrong], name)
    return multiple_choice(pick(MODULE_QUESTIONS, name).format(name=name), choices, choices.index(module))

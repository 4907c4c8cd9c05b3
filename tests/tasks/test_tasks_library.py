"""Questions about the standard library have true answers, and what one task is examined with no other explains."""

import importlib
import inspect
from collections import Counter
from types import ModuleType
from typing import Any

import pytest

from nanochat.tasks.library import library
from nanochat.tasks.library_choice import KINDS, kind_objects, library_kinds, library_modules, module_objects
from nanochat.tasks.library_objects import MAX_SUMMARY_CHARACTERS, library_objects, split_objects, summary
from nanochat.tasks.task import Problem

OBJECTS = {item.name: item for item in library_objects()}


@pytest.mark.parametrize(
    ("name", "kind", "module"),
    [
        ("os.path", "module", None),
        ("os.path.join", "function", "os.path"),
        ("json.JSONDecoder", "class", "json"),
        ("json.JSONDecoder.decode", "method", "json"),
        ("math.gcd", "function", "math"),
        ("str.split", "method", None),
        ("sorted", "function", None),
        ("pathlib.PurePath.parent", None, "pathlib"),
    ],
)
def test_well_known_objects_are_known_for_what_they_are(name: str, kind: str | None, module: str | None) -> None:
    if name in OBJECTS:
        assert (OBJECTS[name].kind, OBJECTS[name].module) == (kind, module)
    else:
        assert name in ("os.path", "str.split"), f"{name} is not described"


def is_of_kind(value: Any, kind: str) -> bool:
    if kind == "module":
        return isinstance(value, ModuleType)
    if kind == "class":
        return isinstance(value, type)
    return callable(value)


def test_kinds_are_what_python_itself_says() -> None:
    """Some names are defined for other systems or replaced when imported, so a few may differ, but only a few."""
    checked = wrong = 0
    for item in library_objects():
        module_name = item.module or item.name
        if item.kind is None or module_name not in ("json", "argparse", "shutil", "textwrap", "inspect", "fractions"):
            continue
        value: Any = importlib.import_module(module_name)
        for part in item.name.removeprefix(module_name).strip(".").split("."):
            value = inspect.getattr_static(value, part) if part else value
        value = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        checked += 1
        wrong += not is_of_kind(value, item.kind)
    assert checked > 100
    assert wrong == 0


def asked_about(problem: Problem) -> str:
    return problem.conversation.messages[0].text.split("`")[1]


def test_no_object_is_trained_on_in_one_task_and_examined_in_another() -> None:
    tasks = (library(), library_kinds(), library_modules())
    train = {asked_about(problem) for task in tasks for problem in task.problems("train")}
    test = {asked_about(problem) for task in tasks for problem in task.problems("test")}
    assert len(train) > 5000
    assert 400 < len(test) < 1000
    assert not train & test
    assert not {item.name for item in split_objects("train")} & {item.name for item in split_objects("test")}


def test_the_letter_names_the_kind() -> None:
    for item, problem in zip(kind_objects("test"), library_kinds().problems("test"), strict=True):
        assert f"- a {item.kind}={problem.answer}\n" in problem.conversation.messages[0].text


def test_the_kinds_are_equally_frequent_in_the_test_so_a_fixed_answer_is_no_better_than_chance() -> None:
    answers = Counter(problem.answer for problem in library_kinds().problems("test"))
    assert len(answers) == len(KINDS)
    assert len(set(answers.values())) == 1
    assert answers["A"] >= 25


def test_the_letter_names_the_module_and_no_other_choice_is_right() -> None:
    answers = Counter()
    for item, problem in zip(module_objects("test"), library_modules().problems("test"), strict=True):
        lines = problem.conversation.messages[0].text.splitlines()
        choices = {line[-1]: line[2:-2] for line in lines if line.startswith("- ")}
        assert choices[problem.answer] == item.module
        assert len(set(choices.values())) == 4
        right = [choice for choice in choices.values() if item.name.startswith(f"{choice}.")]
        assert right == [item.module]
        answers[problem.answer] += 1
    assert all(60 < answers[letter] < 140 for letter in "ABCD")


def test_answers_are_whole_sentences_and_short() -> None:
    for problem in library().problems("train"):
        assert 0 < len(problem.answer) <= MAX_SUMMARY_CHARACTERS + 1
        assert problem.answer[-1] in ".!?"
        assert "\n" not in problem.answer


@pytest.mark.parametrize(
    ("prose", "expected"),
    [
        ("Join paths.\n\nMore about it.", "Join paths."),
        ("Join two\npaths", "Join two paths."),
        ("Use e.g. Linux. Then go.", "Use e.g. Linux. Then go."),
        ("join(a, b) -> path\n\nJoin two paths.", "Join two paths."),
        ("Does three things:\n\n- one", ""),
        (f"First. {'Word ' * 60}.", "First."),
        ("word " * 60, ""),
        ("", ""),
    ],
)
def test_a_summary_is_the_first_sentences_of_the_prose(prose: str, expected: str) -> None:
    assert summary(prose) == expected

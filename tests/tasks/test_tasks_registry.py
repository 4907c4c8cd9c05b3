"""Every task, whatever it is made of, keeps what tasks promise."""

from pathlib import Path

import pytest
from hub_copies import write_all

from nanochat.errors import UsageError
from nanochat.tasks.registry import GENERATED, TASK_NAMES, check_task_name, open_task
from nanochat.tasks.task import Split
from nanochat.tokenizer.conversation import render_conversation
from nanochat.tokenizer.tokenizer import Tokenizer
from nanochat.tokenizer.train import train_tokenizer


@pytest.fixture(scope="module")
def task_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task_data")
    write_all(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(
        ["a few words for a tokenizer that falls back on bytes"] * 9, vocab_size=280, max_chars=10**5
    )


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", TASK_NAMES)
def test_every_problem_renders_and_has_its_answer_among_its_choices(
    name: str, split: Split, task_data: Path, tokenizer: Tokenizer
) -> None:
    task = open_task(name, task_data)
    problems = task.problems(split)
    assert len(problems) > 0
    for problem in problems[:: max(1, len(problems) // 500)]:
        assert any(render_conversation(tokenizer, problem.conversation).trained)
        assert problem.conversation.messages[-1].role == "assistant"
        assert (problem.answer in problem.choices) == (task.kind == "choice")
        assert all(len(tokenizer.encode(choice)) == 1 for choice in problem.choices)
        if task.is_correct:
            assert task.is_correct(problem, problem.answer)


@pytest.mark.parametrize("name", TASK_NAMES)
def test_no_question_is_both_trained_on_and_examined(name: str, task_data: Path) -> None:
    task = open_task(name, task_data)
    train, test = ({each.conversation.messages[0].text for each in task.problems(split)} for split in ("train", "test"))
    assert not train & test


@pytest.mark.parametrize("name", TASK_NAMES)
def test_a_task_is_known_by_its_name_and_judged_by_its_kind(name: str, task_data: Path) -> None:
    task = open_task(name, task_data)
    assert task.name == name
    assert (task.is_correct is not None) == (task.kind == "generative")
    assert (task.chance > 0) == (task.kind == "choice")


@pytest.mark.parametrize("name", GENERATED)
def test_generated_problems_are_the_same_each_time(name: str) -> None:
    first, second = (GENERATED[name][0]().problems("train") for _ in range(2))
    assert list(first) == list(second)


def test_an_unknown_task_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(UsageError, match="there is no task 'mlmu' — choose of: arc-challenge, arc-easy, arithmetic, "):
        open_task("mlmu", Path("task_data"))
    assert check_task_name("jsonl=x") == "jsonl=x"

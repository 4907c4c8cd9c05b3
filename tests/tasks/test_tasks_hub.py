"""The hub's data sets load from their real layouts, without network, and say what is wrong with them."""

import socket
from pathlib import Path
from typing import Any

import pytest
from hub_copies import arc_row, mmlu_row, write_all, write_mmlu, write_parquet

from nanochat.errors import DataError
from nanochat.tasks.registry import STAGED, describe_task, open_task
from nanochat.tasks.task import Problem, Split


@pytest.fixture(scope="module")
def task_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workspace [1]") / "task_data"
    write_all(folder)
    return folder


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def question(problem: Problem) -> str:
    return problem.conversation.messages[0].text


SIZES = [
    ("smoltalk", 12, 1),
    ("mmlu", 6, 5),
    ("gsm8k", 4, 3),
    ("arc-easy", 4, 4),
    ("arc-challenge", 4, 4),
]


def test_every_staged_task_is_tested_here() -> None:
    assert {name for name, _, _ in SIZES} == set(STAGED)


@pytest.mark.parametrize(("name", "train", "test"), SIZES)
def test_both_splits_load_whole(task_data: Path, name: str, train: int, test: int) -> None:
    task = open_task(name, task_data)
    assert task.name == name
    questions: dict[Split, set[str]] = {}
    for split, size in (("train", train), ("test", test)):
        problems = task.problems(split)
        assert len(problems) == len(list(problems)) == size
        assert problems[-1] == list(problems)[-1] == problems[-1:][0]
        questions[split] = set(map(question, problems))
        assert len(questions[split]) == size
        with pytest.raises(IndexError):
            problems[size]
    assert not questions["train"] & questions["test"]


def test_smoltalk_reads_its_shards_in_order_and_passes_over_empty_messages(task_data: Path) -> None:
    task = open_task("smoltalk", task_data)
    assert [question(problem) for problem in task.problems("train")][2:4] == ["question 0.2", "question 1.0"]
    messages = task.problems("test")[0].conversation.messages
    assert [message.text for message in messages] == [
        "Answer briefly.\n\na question",
        "an answer",
        "and then?",
        "then this",
    ]


def test_mmlu_answers_are_letters_and_its_training_rows_are_found_in_either_layout(
    task_data: Path, tmp_path: Path
) -> None:
    assert [problem.answer for problem in open_task("mmlu", task_data).problems("train")] == list("ABCDAB")
    assert [problem.answer for problem in open_task("mmlu", task_data).problems("test")] == list("ABCDA")
    write_parquet(tmp_path / "cais--mmlu/all/auxiliary_train-00000-of-00001.parquet", [mmlu_row("plain?", 3)])
    (problem,) = open_task("mmlu", tmp_path).problems("train")
    assert "plain?" in question(problem)
    assert "- dust=D\n" in question(problem)
    assert problem.answer == "D"


def test_arc_gives_letters_whatever_the_choices_are_labelled_with(task_data: Path) -> None:
    problems = open_task("arc-easy", task_data).problems("test")
    assert [problem.answer for problem in problems] == ["C", "B", "A", "E"]
    assert [len(problem.choices) for problem in problems] == [4, 4, 3, 5]
    assert "- choice 2=B\n" in question(problems[1])
    assert question(open_task("arc-challenge", task_data).problems("test")[0]) != question(problems[0])


def test_gsm8k_calls_the_calculator_and_judges_its_own_answers_right(task_data: Path) -> None:
    task = open_task("gsm8k", task_data)
    assert task.is_correct is not None
    problem = task.problems("test")[0]
    calls = [part.text for part in problem.conversation.messages[1].parts if part.kind == "python"]
    assert calls == ["12*3", "36*.5", "18+1,000"]
    assert task.is_correct(problem, problem.answer)
    assert not task.is_correct(problem, "#### 1019")


@pytest.mark.parametrize("name", STAGED)
def test_a_missing_data_set_names_the_command_that_stages_it(tmp_path: Path, name: str) -> None:
    for use in (lambda: open_task(name, tmp_path).problems("test"), lambda: describe_task(name, tmp_path)):
        with pytest.raises(DataError, match=rf"is not there — .*nanochat stage {name}$"):
            use()


def test_another_column_is_noticed(tmp_path: Path) -> None:
    write_parquet(tmp_path / "cais--mmlu/all/test-00000-of-00001.parquet", [{"query": "?", "answer": 1}])
    with pytest.raises(DataError, match=r"test-00000-of-00001.parquet has no column 'question', only query, answer"):
        open_task("mmlu", tmp_path).problems("test")


def test_a_row_that_is_no_problem_is_named(tmp_path: Path) -> None:
    rows = [arc_row("fine", "ABCD", "A"), arc_row("odd", "ABCD", "F")]
    write_parquet(tmp_path / "allenai--ai2_arc/ARC-Easy/test-00000-of-00001.parquet", rows)
    problems = open_task("arc-easy", tmp_path).problems("test")
    assert problems[0].answer == "A"
    with pytest.raises(DataError, match=r"allenai--ai2_arc \(test\) row 2 "):
        problems[1]


def test_a_truncated_file_is_called_damaged(tmp_path: Path) -> None:
    write_mmlu(tmp_path)
    path = tmp_path / "cais--mmlu/all/test-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(
        DataError, match=r"cais--mmlu/all is damaged .* delete .*cais--mmlu and run: nanochat stage mmlu"
    ):
        open_task("mmlu", tmp_path).problems("test")


def test_changed_files_are_read_anew_and_change_the_description(tmp_path: Path) -> None:
    write_mmlu(tmp_path)
    before = describe_task("mmlu", tmp_path)
    assert describe_task("mmlu", tmp_path) == before
    assert len(open_task("mmlu", tmp_path).problems("test")) == 5
    write_parquet(tmp_path / "cais--mmlu/all/test-00000-of-00001.parquet", [mmlu_row("new?", 0)] * 7)
    assert len(open_task("mmlu", tmp_path).problems("test")) == 7
    assert describe_task("mmlu", tmp_path) != before

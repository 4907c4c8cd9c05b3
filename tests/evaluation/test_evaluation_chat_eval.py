"""Examining a checkpoint: the same result for any batch and number of ranks, kept as a file that says what it is of."""

import io
import json
import random
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from examinees import CPU, as_trained, byte_tokenizer, question, random_model, rank_runtime, saying

from distributed import run_distributed
from nanochat.config import TrainBaseConfig
from nanochat.errors import UsageError
from nanochat.evaluation.chat_eval import (
    DEFAULT_TASKS,
    TaskResult,
    evaluate_chat,
    evaluate_tasks,
    sample_problems,
    tasks_to_examine,
)
from nanochat.tasks.multiple_choice import multiple_choice
from nanochat.tasks.task import Problem, Split, Task
from nanochat.tracking.console import Console
from nanochat.training.base import train_base
from nanochat.workspace import Workspace

TOKENIZER = byte_tokenizer()
Run = Callable[..., "subprocess.CompletedProcess[str]"]


def choice_problems(split: Split) -> Sequence[Problem]:
    draw = random.Random(split)
    return [
        multiple_choice("x" * draw.randrange(99) + f"{i}?", ["one", "two", "three", "four"][: 2 + i % 3], i % 2)
        for i in range(23)
    ]


def text_problems(split: Split) -> Sequence[Problem]:
    draw = random.Random(split)
    return [question("y" * draw.randrange(60) + f"{i}?", "abc"[i % 3]) for i in range(17)]


CHOICE = Task("letters", "choice", choice_problems, chance=0.25)
# A random model says nothing sensible, so half of what it may say is right, and every token decides.
TEXTS = Task("texts", "generative", text_problems, lambda problem, text: sum(map(ord, text)) % 2 == 0)
TASKS = (CHOICE, TEXTS)


def examine(runtime_of_rank: bool = False, batch_size: int = 4) -> dict[str, TaskResult]:
    trained = as_trained(random_model(TOKENIZER), TOKENIZER)
    runtime = rank_runtime() if runtime_of_rank else CPU
    return evaluate_tasks(trained, TASKS, runtime, batch_size=batch_size, max_new_tokens=40)


def test_every_problem_counts_and_some_are_solved() -> None:
    results = examine()
    assert {name: (result.n, result.kind) for name, result in results.items()} == {
        "letters": (23, "choice"),
        "texts": (17, "generative"),
    }
    assert all(0 < result.correct < result.n for result in results.values())
    assert results["letters"].cut > 0


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_the_result_does_not_depend_on_the_batch(batch_size: int) -> None:
    assert examine(batch_size=batch_size) == examine()


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_result_does_not_depend_on_the_number_of_ranks(world_size: int) -> None:
    assert run_distributed(examine, world_size, True) == [examine()] * world_size


def test_a_model_that_knows_has_everything_right() -> None:
    tasks = [
        Task("b", "choice", lambda split: [multiple_choice(f"{i}?", "wxyz", 1) for i in range(5)], chance=0.25),
        Task("text", "generative", lambda split: [question("?", "B")] * 3, lambda problem, text: text == "B"),
    ]
    results = evaluate_tasks(as_trained(saying(TOKENIZER, ["B"]), TOKENIZER), tasks, CPU)
    assert [(result.accuracy, result.centred) for result in results.values()] == [(1, 1), (1, 1)]


def test_a_smaller_sample_is_part_of_a_larger_one_and_not_the_beginning() -> None:
    samples = [sample_problems(CHOICE, count) for count in (5, 12, 23)]
    assert [len(sample) for sample in samples] == [5, 12, 23]
    assert samples[0] == samples[1][:5] == samples[2][:5] != sample_problems(CHOICE, None)[:5]
    assert sample_problems(CHOICE, 99) == samples[2]


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        (Task("smalltalk", "talk", text_problems), {}, "smalltalk has no right answers"),
        (Task("void", "choice", lambda split: []), {}, "no test problem of the task void"),
        (CHOICE, {"max_problems": 0}, "--max-problems is 0"),
        (CHOICE, {"batch_size": 0}, "--batch-size is 0"),
    ],
)
def test_what_cannot_be_examined_is_refused(task: Task, options: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        evaluate_tasks(as_trained(random_model(TOKENIZER), TOKENIZER), [task], CPU, **options)


def test_the_tasks_are_those_it_was_trained_on_that_have_right_answers(tmp_path: Path) -> None:
    def names(*entries: str) -> list[str]:
        trained = as_trained(random_model(TOKENIZER), TOKENIZER, **({"tasks": entries} if entries else {}))
        return [task.name for task in tasks_to_examine(trained, tmp_path)]

    own = f"jsonl={tmp_path / 'own.jsonl'}"
    assert names("identity", "arithmetic:x4", "library-kinds:300", "arithmetic", own) == ["arithmetic", "library-kinds"]
    assert names("identity") == names() == list(DEFAULT_TASKS)


def test_the_file_says_what_was_examined_and_how_sure_it_is(tmp_path: Path) -> None:
    workspace, shown = Workspace(tmp_path), io.StringIO()
    trained = as_trained(random_model(TOKENIZER), TOKENIZER)
    content = evaluate_chat(
        trained, TASKS, workspace, CPU, max_problems=10, max_new_tokens=20, console=Console(stream=shown)
    )
    path = tmp_path / "evaluations" / "sft" / "tiny" / "step_000003_chat.json"
    written = json.loads(path.read_text())
    assert written.items() >= json.loads(json.dumps(content)).items()
    assert written["checkpoint"] == trained.fingerprint
    assert written["config"] == {"tasks": ["letters", "texts"], "max_problems": 10, "max_new_tokens": 20}
    letters = written["results"]["letters"]
    assert letters["n"] == 10
    assert letters["low"] <= letters["accuracy"] == letters["correct"] / 10 <= letters["high"]
    assert written["mean_centred"] == pytest.approx(sum(r["centred"] for r in written["results"].values()) / 2)
    assert str(path) in shown.getvalue()

    before = path.read_bytes()
    evaluate_chat(trained, TASKS, workspace, CPU, max_problems=10, max_new_tokens=20)
    assert path.read_bytes() == before


TINY = TrainBaseConfig(
    depth=2,
    aspect_ratio=16,
    head_dim=16,
    sequence_len=64,
    model_tag="tiny",
    num_steps=2,
    total_batch_size=4 * 64,
    device_batch_size=4,
    lanes=4,
    pool_size=8,
    eval_tokens=1024,
    dtype="float32",
    wandb="disabled",
)


def test_the_commands_examine_a_trained_model(prepared_workspace: Workspace, run_command: Run) -> None:
    trained = train_base(TINY, "a-run", prepared_workspace, CPU)
    root = prepared_workspace.root
    result = run_command("eval", "base", "--dtype", "float32", workspace=root)
    assert result.returncode == 0, result.stderr
    assert f"no CORE: {root / 'eval_bundle'} is missing" in result.stdout
    written = json.loads((root / "evaluations" / "base" / "tiny" / "step_000002_base.json").read_text())
    assert written["epoch/bpb"] == pytest.approx(trained["epoch/bpb"], rel=1e-6)
    assert written["core"] is None

    options = ("--tasks", "arithmetic", "library-kinds", "--max-problems", "5", "--max-new-tokens", "8")
    result = run_command("eval", "chat", "-i", "base", *options, workspace=root)
    assert result.returncode == 0, result.stderr
    assert "95 % interval" in result.stdout
    written = json.loads((root / "evaluations" / "base" / "tiny" / "step_000002_chat.json").read_text())
    assert {name: task["n"] for name, task in written["results"].items()} == {"arithmetic": 5, "library-kinds": 5}

"""What a model can do in conversation: multiple choice by likelihood, and free text judged by the task."""

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.chat.engine import Engine
from nanochat.checkpoint.trained_model import TrainedModel
from nanochat.errors import UsageError
from nanochat.evaluation.choice import judge_choices
from nanochat.evaluation.generative import judge_texts
from nanochat.evaluation.questions import Verdict, question_length
from nanochat.evaluation.results import write_results
from nanochat.evaluation.sharing import answer_all, check_positive
from nanochat.evaluation.statistics import Score, mean_centred, score_table
from nanochat.runtime import Runtime, run_on_main
from nanochat.tasks.mixture import parse_mixture
from nanochat.tasks.registry import open_task
from nanochat.tasks.task import Kind, Problem, Task
from nanochat.tracking.console import Console
from nanochat.workspace import Workspace

# What a model is examined with that was not trained on any task.
DEFAULT_TASKS = ("library-kinds", "library-modules", "arithmetic", "spelling")
SAMPLE_SEED = 0


@dataclass(frozen=True)
class TaskResult(Score):
    """The score of one task.

    Attributes:
        kind: how it was examined.
        cut: problems whose question was cut to fit the context.
    """

    kind: Kind
    cut: int


def evaluate_tasks(
    trained: TrainedModel,
    tasks: Sequence[Task],
    runtime: Runtime,
    *,
    batch_size: int = 16,
    max_problems: int | None = None,
    max_new_tokens: int = 256,
    console: Console | None = None,
) -> dict[str, TaskResult]:
    """Examine a model with the test problems of some tasks, over all ranks.

    Args:
        batch_size: problems per forward pass on one device.
        max_problems: of each task, at most this many. A uniform sample, the same one every time; a smaller one is part
            of a larger one.
        max_new_tokens: the longest answer in free text.
        console: shows how far it is.

    Returns:
        The result of each task by name, on every rank.

    Raises:
        UsageError: a task cannot be examined: it has no right answers, or no problems; or a count is below 1.
    """
    check_positive(batch_size=batch_size, max_problems=max_problems)
    # All of them first: a data set that is missing should not be found out after minutes of work.
    sampled = [(task, sample_problems(task, max_problems)) for task in tasks]
    results = {}
    for task, problems in sampled:
        judge: Callable[[Sequence[Problem]], list[Verdict]]
        if task.kind == "choice":
            judge = functools.partial(judge_choices, trained.model, trained.tokenizer)
        else:
            engine = Engine(trained.model, trained.tokenizer)
            judge = functools.partial(judge_texts, engine, task, max_new_tokens=max_new_tokens)
        verdicts = answer_all(
            problems,
            question_length,
            judge,
            runtime,
            batch_size,
            console=console or Console(enabled=False),
            description=task.name,
        )
        correct, cut = (sum(getattr(verdict, name) for verdict in verdicts) for name in ("correct", "cut"))
        results[task.name] = TaskResult(len(verdicts), correct, task.chance, task.kind, cut)
    return results


def sample_problems(task: Task, max_problems: int | None) -> list[Problem]:
    """Test problems of a task: all, or the first of a seeded shuffle.

    Raises:
        UsageError: there are none, or they have no right answers.
    """
    if task.kind == "talk":
        raise UsageError(f"the task {task.name} has no right answers to examine", "leave it out of --tasks")
    problems = list(task.problems("test"))
    if max_problems is not None:
        random.Random(SAMPLE_SEED).shuffle(problems)
        problems = problems[:max_problems]
    if not problems:
        raise UsageError(f"there is no test problem of the task {task.name}", "leave it out of --tasks")
    return problems


def tasks_to_examine(trained: TrainedModel, task_data: Path) -> list[Task]:
    """The tasks with right answers that a checkpoint was trained on; if there are none, `DEFAULT_TASKS`.

    Args:
        task_data: the folder of staged data sets.
    """
    entries: Sequence[str] = trained.config.get("tasks", ())
    names = dict.fromkeys(entry.task for entry in parse_mixture(entries)) if entries else {}
    trained_on = [task for name in names if (task := open_task(name, task_data)).kind != "talk"]
    return trained_on or [open_task(name, task_data) for name in DEFAULT_TASKS]


def evaluate_chat(
    trained: TrainedModel,
    tasks: Sequence[Task],
    workspace: Workspace,
    runtime: Runtime,
    *,
    batch_size: int = 16,
    max_problems: int | None = None,
    max_new_tokens: int = 256,
    console: Console | None = None,
) -> dict[str, Any]:
    """Examine a checkpoint, write the results beside those of other checkpoints, and show them.

    Args and errors as of `evaluate_tasks`.

    Returns:
        What the file holds but for what names the checkpoint: `config`, `results` by task, and `mean_centred` with
        `mean_centred_error`. nanochat calls that mean ChatCORE; it compares only between the same tasks.
    """
    console = console or Console(enabled=False)
    results = evaluate_tasks(
        trained,
        tasks,
        runtime,
        batch_size=batch_size,
        max_problems=max_problems,
        max_new_tokens=max_new_tokens,
        console=console,
    )
    mean, error = mean_centred(results.values())
    content = {
        "config": {"tasks": list(results), "max_problems": max_problems, "max_new_tokens": max_new_tokens},
        "results": {name: result.as_json() for name, result in results.items()},
        "mean_centred": mean,
        "mean_centred_error": error,
    }
    console.info(score_table(results))
    console.info(f"mean centred accuracy {mean:.3f} ± {error:.3f} (standard error)")
    console.info(str(run_on_main(lambda: write_results(workspace, trained, "chat", content))))
    return content

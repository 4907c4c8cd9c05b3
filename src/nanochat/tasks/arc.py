"""ARC: multiple choice from school science, an easy set and one that simple methods fail at.

https://huggingface.co/datasets/allenai/ai2_arc (Clark et al. 2018, https://arxiv.org/abs/1803.05457).
"""

from pathlib import Path
from typing import Any

from nanochat.tasks.hub import HubDataset
from nanochat.tasks.multiple_choice import multiple_choice
from nanochat.tasks.task import Problem, Task

VERSION = 1


def _dataset(task: str, subset: str) -> HubDataset:
    return HubDataset(
        task,
        "allenai/ai2_arc",
        {"train": (f"{subset}/train-*.parquet",), "test": (f"{subset}/test-*.parquet",)},
        ("question", "choices", "answerKey"),
    )


EASY_DATASET = _dataset("arc-easy", "ARC-Easy")
CHALLENGE_DATASET = _dataset("arc-challenge", "ARC-Challenge")


def arc_easy(task_data: Path) -> Task:
    """Questions that a search or co-occurring words can answer."""
    return _task(EASY_DATASET, task_data)


def arc_challenge(task_data: Path) -> Task:
    """Questions that those cannot answer."""
    return _task(CHALLENGE_DATASET, task_data)


def _task(dataset: HubDataset, task_data: Path) -> Task:
    # A few problems have three or five choices.
    return Task(dataset.task, "choice", lambda split: dataset.problems(task_data, split, _problem), chance=0.25)


def _problem(row: Any) -> Problem:
    """The choices are labelled A to E or 1 to 5, depending on the examination; here all get letters."""
    choices = row["choices"]
    return multiple_choice(row["question"], choices["text"], choices["label"].index(row["answerKey"]))

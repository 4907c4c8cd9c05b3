"""MMLU: multiple choice over 57 school and university subjects.

https://huggingface.co/datasets/cais/mmlu (Hendrycks et al. 2021, https://arxiv.org/abs/2009.03300). Trained on is its
`auxiliary_train`, questions of the same form from other examinations.
"""

from pathlib import Path
from typing import Any

from nanochat.tasks.hub import HubDataset
from nanochat.tasks.multiple_choice import multiple_choice
from nanochat.tasks.task import Problem, Task

VERSION = 1
DATASET = HubDataset(
    "mmlu",
    "cais/mmlu",
    {
        "train": ("auxiliary_train/train-*.parquet", "all/auxiliary_train-*.parquet"),
        "test": ("all/test-*.parquet",),
    },
    ("question", "choices", "answer"),
)


def mmlu(task_data: Path) -> Task:
    """Questions with four choices."""
    return Task("mmlu", "choice", lambda split: DATASET.problems(task_data, split, _problem), chance=0.25)


def _problem(row: Any) -> Problem:
    return multiple_choice(row["question"], row["choices"], row["answer"])

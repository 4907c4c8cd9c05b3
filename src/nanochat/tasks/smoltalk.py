"""SmolTalk: general conversations, in the selection made for small models.

https://huggingface.co/datasets/HuggingFaceTB/smol-smoltalk: 460 thousand to train on, 24 thousand for the test.
"""

from pathlib import Path
from typing import Any

from nanochat.corpus.conversation import conversation_from_json
from nanochat.tasks.hub import HubDataset
from nanochat.tasks.task import Problem, Task

VERSION = 1
DATASET = HubDataset(
    "smoltalk",
    "HuggingFaceTB/smol-smoltalk",
    {"train": ("data/train-*.parquet",), "test": ("data/test-*.parquet",)},
    ("messages",),
)


def smoltalk(task_data: Path) -> Task:
    """Conversations about everything; those with an empty message are left out."""
    return Task(
        "smoltalk", "talk", lambda split: DATASET.problems(task_data, split, _problem, keep=_has_only_full_messages)
    )


def _has_only_full_messages(row: Any) -> bool:
    return all(message["content"] for message in row["messages"])


def _problem(row: Any) -> Problem:
    return Problem(conversation_from_json(row))

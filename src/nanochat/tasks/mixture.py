"""Mixtures: which tasks a model is trained on, and how much of each.

A mixture is a list of entries: `NAME`, once through; `NAME:xN`, N times; `NAME:N`, N conversations drawn at random.
"""

import random
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from nanochat.config import RunConfig, StageName
from nanochat.corpus.conversation import Conversation
from nanochat.errors import DataError, UsageError
from nanochat.files import fingerprint
from nanochat.tasks.registry import STAGED, check_task_name, describe_task, open_task
from nanochat.tasks.task import Split

SAMPLE_SEED = 0
AMOUNT = re.compile(r"(.+?):(x?)(\d+)")


@dataclass(frozen=True)
class Entry:
    """One task's part in a mixture.

    Attributes:
        task: its name.
        times: how often each conversation is trained on.
        limit: how many conversations, drawn at random, always the same ones; `None` for all. A task that has fewer
            gives all that it has.
    """

    task: str
    times: int = 1
    limit: int | None = None


def parse_mixture(entries: Sequence[str]) -> tuple[Entry, ...]:
    """Read the entries of a mixture.

    Raises:
        UsageError: there are none, an amount is 0, or a task is not there.
    """
    if not entries:
        raise UsageError("a mixture without tasks trains nothing", "name some, for example: library arithmetic:x2")
    return tuple(map(_parse_entry, entries))


def _parse_entry(text: str) -> Entry:
    match = AMOUNT.fullmatch(text)
    if match is None:
        return Entry(check_task_name(text))
    name, times, amount = match[1], match[2], int(match[3])
    if amount == 0:
        raise UsageError(f"{text} asks for nothing", "leave the entry out, or give a number of 1 or more")
    return Entry(check_task_name(name), times=amount) if times else Entry(check_task_name(name), limit=amount)


def mixture(entries: Sequence[str], task_data: Path, split: Split) -> Iterator[Conversation]:
    """Yield the conversations of a mixture, one task after the other; the order of training is the loader's affair.

    Of the test split everything comes once at most: seeing it again would tell nothing new.

    Raises:
        UsageError: the entries are wrong.
        DataError: files of a task are missing or damaged.
    """
    for entry in parse_mixture(entries):
        problems = open_task(entry.task, task_data).problems(split)
        indices: Sequence[int] = range(len(problems))
        if entry.limit is not None and entry.limit < len(problems):
            indices = sorted(random.Random(SAMPLE_SEED).sample(indices, entry.limit))
        for _ in range(entry.times if split == "train" else 1):
            for index in indices:
                yield problems[index].conversation


def mixtures_of(config: RunConfig, stages: Collection[StageName]) -> list[tuple[str, ...]]:
    """The tasks that the chosen stages train on or examine with."""
    chosen = {"mid": config.mid.tasks, "sft": config.sft.tasks, "eval": examined_tasks(config)}
    return [tasks for name, tasks in chosen.items() if name in stages]


def examined_tasks(config: RunConfig) -> tuple[str, ...]:
    """The names of the tasks to examine with: those asked for, or all that are trained on; some may be mere talk."""
    entries = config.evaluation.tasks or (*config.mid.tasks, *config.sft.tasks)
    return tuple(dict.fromkeys(entry.task for entry in parse_mixture(entries)))


def check_mixtures(mixtures: Iterable[Sequence[str]], task_data: Path) -> None:
    """Check, in an instant, that everything some mixtures need is there.

    Raises:
        UsageError: an entry is wrong.
        DataError: files are missing; it names those of all tasks at once.
    """
    missing: dict[str, DataError] = {}
    for name in dict.fromkeys(entry.task for entries in mixtures for entry in parse_mixture(entries)):
        try:
            describe_task(name, task_data)
        except DataError as error:
            missing[name] = error
    if len(missing) == 1:
        raise next(iter(missing.values()))
    if missing:
        staged = " ".join(name for name in missing if name in STAGED)
        raise DataError(
            "; ".join(error.what for error in missing.values()),
            f"stage them where there is network: nanochat stage {staged}; or choose tasks whose data you have",
        )


def mixture_fingerprint(entries: Sequence[str], task_data: Path) -> str:
    """Equal if and only if a mixture's conversations are, as far as names, versions and files tell; reads no data set.

    Raises:
        UsageError: the entries are wrong.
        DataError: files of a task are missing.
    """
    return fingerprint(
        [{**asdict(entry), "task": describe_task(entry.task, task_data)} for entry in parse_mixture(entries)]
    )

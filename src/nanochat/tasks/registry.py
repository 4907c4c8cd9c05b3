"""The tasks there are, by the names of the command line."""

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanochat.errors import DataError, UsageError
from nanochat.files import sha256_file
from nanochat.tasks import (
    arc,
    arithmetic,
    gsm8k,
    identity,
    library,
    library_choice,
    mmlu,
    own_jsonl,
    smoltalk,
    spelling,
)
from nanochat.tasks.hub import HubDataset
from nanochat.tasks.task import Task

# Made by this Python from what it carries; each with the version of its recipe, raised when that would make other
# problems than before.
GENERATED: dict[str, tuple[Callable[[], Task], int]] = {
    "arithmetic": (arithmetic.arithmetic, arithmetic.VERSION),
    "identity": (identity.identity, identity.VERSION),
    "library": (library.library, library.VERSION),
    "library-kinds": (library_choice.library_kinds, library_choice.KINDS_VERSION),
    "library-modules": (library_choice.library_modules, library_choice.MODULES_VERSION),
    "spelling": (spelling.spelling, spelling.VERSION),
}

# Read from `task_data/`; each with its data set and the version of the code that turns rows into problems.
STAGED: dict[str, tuple[Callable[[Path], Task], HubDataset, int]] = {
    "arc-challenge": (arc.arc_challenge, arc.CHALLENGE_DATASET, arc.VERSION),
    "arc-easy": (arc.arc_easy, arc.EASY_DATASET, arc.VERSION),
    "gsm8k": (gsm8k.gsm8k, gsm8k.DATASET, gsm8k.VERSION),
    "mmlu": (mmlu.mmlu, mmlu.DATASET, mmlu.VERSION),
    "smoltalk": (smoltalk.smoltalk, smoltalk.DATASET, smoltalk.VERSION),
}

TASK_NAMES = tuple(sorted([*GENERATED, *STAGED]))


def check_task_name(name: str) -> str:
    """Return `name` if it is a task's, or `jsonl=PATH`.

    Raises:
        UsageError: there is no such task.
    """
    if name not in TASK_NAMES and not (name.startswith(own_jsonl.PREFIX) and name != own_jsonl.PREFIX):
        raise UsageError(f"there is no task {name!r}", f"choose of: {', '.join(TASK_NAMES)}, {own_jsonl.PREFIX}PATH")
    return name


def open_task(name: str, task_data: Path) -> Task:
    """The task of a name. Its problems are read or made when they are asked for.

    Args:
        name: one of TASK_NAMES, or `jsonl=PATH` for conversations of one's own.
        task_data: the folder of staged data sets.

    Raises:
        UsageError: there is no such task.
    """
    check_task_name(name)
    if name in GENERATED:
        return GENERATED[name][0]()
    if name in STAGED:
        return STAGED[name][0](task_data)
    return own_jsonl.own_jsonl(_own_path(name))


def describe_task(name: str, task_data: Path) -> dict[str, Any]:
    """All that decides a task's problems, found without reading or making them; equal descriptions, equal problems.

    Raises:
        UsageError: there is no such task.
        DataError: its files are missing.
    """
    check_task_name(name)
    if name in GENERATED:
        # The standard library, and with it words and names, is another in another Python.
        python = [platform.python_implementation(), platform.python_version(), *platform.python_build()]
        return {"name": name, "version": GENERATED[name][1], "python": python}
    if name in STAGED:
        _, dataset, version = STAGED[name]
        return {"name": name, "version": version, "files": dataset.describe_files(task_data)}
    path = _own_path(name)
    if not path.is_file():
        raise DataError(f"{path} is not there", "check the path after jsonl=")
    return {"name": own_jsonl.PREFIX, "version": own_jsonl.VERSION, "sha256": sha256_file(path)}


def _own_path(name: str) -> Path:
    return Path(name.removeprefix(own_jsonl.PREFIX)).expanduser()

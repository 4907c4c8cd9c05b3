"""What a look at a machine or a run finds, and the looks that the doctor and preflight share."""

import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nanochat.errors import NanochatError
from nanochat.tracking.console import format_bytes
from nanochat.tracking.wandb_key import check_key, find_key
from nanochat.tracking.wandb_run import MODE_NAMES
from nanochat.workspace import Workspace

State = Literal["OK", "note", "PROBLEM"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: what it is, how it is, and for a problem the command or change that mends it."""

    subject: str
    text: str
    state: State = "OK"
    fix: str = ""


def table(findings: Sequence[Finding]) -> str:
    """One line for each finding: its state, its subject, what was found, and the fix after a dash."""
    width = max(len(finding.subject) for finding in findings) + 2
    return "\n".join(
        f"{finding.state:<9}{finding.subject:<{width}}{finding.text}{f' — {finding.fix}' if finding.fix else ''}"
        for finding in findings
    )


def looked_at(subject: str, check: Callable[[], Finding | Iterable[Finding]]) -> list[Finding]:
    """What a check finds; an error that it raises is a finding too, after those it made before."""
    findings: list[Finding] = []
    try:
        found = check()
        findings.extend([found] if isinstance(found, Finding) else found)
    except NanochatError as error:
        findings.append(Finding(subject, error.what, "PROBLEM", error.fix or ""))
    except Exception as error:
        text, fix = f"could not be looked at: {one_line(error)}", "if nothing above explains it, please report it"
        findings.append(Finding(subject, text, "PROBLEM", fix))
    return findings


def check_folder(
    subject: str, path: Path, fix: str, enough: int = 0, at_ease: int = 0, unusable: State = "PROBLEM"
) -> Finding:
    """Whether a folder can be written to, or made, and how much room there is."""
    # Unlike Path.exists, access() raises nothing where a folder on the way may not be entered.
    there = next(folder for folder in (path, *path.parents) if os.access(folder, os.F_OK))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return Finding(subject, f"{path} cannot be written: {there} is not a folder you may write to", unusable, fix)
    free = shutil.disk_usage(there).free
    room = f"{path}: {format_bytes(free)} free{'' if there == path else ', not made yet'}"
    if free < max(enough, at_ease):
        needed = format_bytes(max(enough, at_ease))
        text = f"{room}, too little for the {needed} that may be needed"
        return Finding(subject, text, "PROBLEM" if free < enough else "note", fix)
    return Finding(subject, room)


def check_caches(environment: Mapping[str, str], workspace: Workspace) -> list[Finding]:
    """Where caches and logs go; only those that torch.compile needs stop a run."""
    home_cache = environment.get("XDG_CACHE_HOME") or f"{environment.get('HOME', '')}/.cache"
    defaults: dict[str, tuple[Path, State]] = {
        "TORCHINDUCTOR_CACHE_DIR": (workspace.cache / "inductor", "PROBLEM"),
        "TRITON_CACHE_DIR": (workspace.cache / "triton", "PROBLEM"),
        "HF_HOME": (Path(home_cache) / "huggingface", "note"),
        "WANDB_DIR": (workspace.wandb, "note"),
    }
    return [
        check_folder(name, Path(environment.get(name) or default).absolute(), f"export {name}=<folder>", unusable=state)
        for name, (default, state) in defaults.items()
    ]


def check_wandb(environment: Mapping[str, str]) -> Finding:
    """How runs are recorded. A key is never shown, only where it is and whether it could be one.

    Raises:
        UsageError: the key cannot be one.
    """
    asked = environment.get("WANDB_MODE", "")
    if asked and asked not in MODE_NAMES:
        return Finding("W&B", f"WANDB_MODE={asked!r} is not a mode", "PROBLEM", "export WANDB_MODE=offline")
    mode = MODE_NAMES[asked] if asked else None
    key = None if mode == "disabled" else find_key(environment)
    if mode == "online" and key is None:
        text = "online, but there is no key, so runs are recorded offline"
        return Finding("W&B", text, "PROBLEM", "wandb login, or export WANDB_MODE=offline")
    if key is None:
        return Finding("W&B", f"{mode or 'offline'}, no key")
    check_key(key)
    if key.warning:
        return Finding("W&B", f"the key in {key.source} can be read by others", "note", f"chmod 600 {key.source}")
    return Finding("W&B", f"{mode or 'online where it answers'}, key in {key.source}")


def one_line(error: Exception) -> str:
    """An error of a library as one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]

"""Runs of W&B in processes of their own, and what they wrote read back by W&B's own reader."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import nanochat

SOURCE = Path(nanochat.__file__).parents[1]

START = """
import os, signal, sys, time
from pathlib import Path
from nanochat.tracking.wandb_run import name_run, start_wandb

def start(run_name="arm_a", stage="base", folder=None, mode="auto", **names):
    config = {"depth": 4, "optimizer": {"lr": 0.02}}
    return start_wandb(name_run(run_name, stage, **names), config, folder=folder or Path(FOLDER), mode=mode)
"""


def python(
    folder: Path, script: str, *, under: tuple[str, ...] = (), environment: dict[str, str] | None = None, **how: Any
) -> subprocess.CompletedProcess[str]:
    """Run a script in a new process with no W&B variables and no key but the ones given."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "SLURM_"))}
    kept |= {"WANDB_X_DISABLE_STATS": "true", "PYTHONPATH": str(SOURCE), "NETRC": str(folder / "no.netrc")}
    code = f"FOLDER = {str(folder)!r}{START}{textwrap.dedent(script)}"
    return subprocess.run(
        [*under, sys.executable, "-c", code],
        env=kept | (environment or {}),
        capture_output=True,
        text=True,
        timeout=120,
        **{"cwd": folder if folder.is_dir() else None, **how},
    )


def run_folders(folder: Path) -> list[Path]:
    """The run folders that W&B made, oldest first."""
    return sorted((folder / "wandb").glob("offline-run-*"))


def read_back(run_folder: Path) -> dict[str, list[Any]]:
    """Every record of an offline run, by type, as W&B's own reader prints them."""
    done = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(run_folder)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "WANDB_ERROR_REPORTING": "false"},
    )
    records: dict[str, list[Any]] = {}
    for record in map(json.loads, done.stdout.splitlines()):
        records.setdefault(record["type"], []).append(record[record["type"]])
    return records


def history(records: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """The rows of metrics, without W&B's own times."""
    return [
        {key: value for key, value in row["item"].items() if key in ("step", "_step") or "/" in key}
        for row in records.get("history", [])
    ]


def console(records: dict[str, list[Any]]) -> str:
    """The run's Logs."""
    return "".join(record["line"] for record in records.get("output_raw", []))

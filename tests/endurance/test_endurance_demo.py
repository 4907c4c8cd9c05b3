"""The demo, killed again and again. Half an hour on two cores: `nox -s endurance`."""

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from nanochat.tracking.keys import CLOCKED

KILLS = 20
# Seconds between a moment's line and the kill: enough to reach into saves, evaluations and the next line's work.
LATEST = 8.0
# Lines that every run prints once, in this order, however often it was killed before.
MOMENT = re.compile(r"step \d+/\d+ |\[\d/\d\] \w+ …$")
# What a clock decides.


def start_demo(workspace: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "nanochat", "demo"],
        env={**os.environ, "NANOCHAT_BASE_DIR": str(workspace)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish_demo(workspace: Path) -> str:
    process = start_demo(workspace)
    output, _ = process.communicate()
    assert process.returncode == 0, output[-2000:]
    return output


def what_a_run_leaves(workspace: Path) -> dict[str, Any]:
    """Digests of weights, optimizer states and data, and every figure that no clock decides."""
    demo = workspace / "demo"
    left: dict[str, Any] = {
        str(path.relative_to(demo)): hashlib.sha256(path.read_bytes()).hexdigest()
        for pattern in (
            "*_checkpoints/*/*/*.safetensors",
            "tokens/*.npy",
            "conversation_tokens/*/*.npy",
            "evaluations/*/*/*.json",
        )
        for path in sorted(demo.glob(pattern))
    }
    for path in sorted(demo.glob("runs/*/*/*/metrics.jsonl")):
        rows = map(json.loads, path.read_text().splitlines())
        left[str(path.relative_to(demo))] = [
            {key: value for key, value in row.items() if key not in CLOCKED} for row in rows
        ]
    left["compared"] = json.loads((demo / "report/sections/eval.json").read_text())["compared"]
    return left


def moments_of(output: str) -> list[str]:
    """The moments of an undisturbed run, from its output."""
    return list(dict.fromkeys(match.group() for line in output.splitlines() if (match := MOMENT.match(line))))


def kill_demo(workspace: Path, moments: Sequence[str], delay: float) -> None:
    """Start the demo, and kill it some seconds after it prints the line of one of these moments."""
    process = start_demo(workspace)
    assert process.stdout is not None
    moment = next((line.strip() for line in process.stdout if line.startswith(tuple(moments))), None)
    assert moment is not None, f"ended before {moments[0]!r}"
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    print(f"killed {delay:.1f} s after {moment}")


@pytest.mark.endurance
@pytest.mark.timeout(3 * 3600)
def test_a_demo_killed_at_twenty_random_moments_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    moments = moments_of(finish_demo(undisturbed))
    chance = random.Random(0)
    # In the order of the run, so that each attempt gets past the moment of the one before.
    for index in sorted(chance.sample(range(len(moments)), KILLS)):
        # Or a later one: what was saved before the last kill is not printed again.
        kill_demo(killed, moments[index:], chance.uniform(0, LATEST))
    finish_demo(killed)
    assert what_a_run_leaves(killed) == what_a_run_leaves(undisturbed)

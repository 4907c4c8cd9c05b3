"""The demo, killed again and again. Half an hour on two cores: `nox -s endurance`."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

KILLS = 20
# Seconds from the start of an attempt to its end: some end while Python starts, some after a checkpoint or two.
SOONEST, LATEST = 4.0, 75.0
# What a clock decides.
CLOCKED = ("time/", "memory/")


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
            {key: value for key, value in row.items() if not key.startswith(CLOCKED)} for row in rows
        ]
    left["compared"] = json.loads((demo / "report/sections/eval.json").read_text())["compared"]
    return left


@pytest.mark.endurance
@pytest.mark.timeout(3 * 3600)
def test_a_demo_killed_at_twenty_random_moments_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    finish_demo(undisturbed)
    chance = random.Random(0)
    kills = 0
    while kills < KILLS:
        process = start_demo(killed)
        time.sleep(chance.uniform(SOONEST, LATEST))
        was_running = process.poll() is None
        if was_running:
            os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        print(f"attempt ended in: {[line for line in output.splitlines() if line.startswith('[')][-1:]}")
        if not was_running:
            break
        kills += 1
    finish_demo(killed)
    print(f"{kills} kills")
    assert kills >= KILLS // 2
    assert what_a_run_leaves(killed) == what_a_run_leaves(undisturbed)

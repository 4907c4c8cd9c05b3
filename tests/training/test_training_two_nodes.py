"""Two nodes of one rank each, processes that only MASTER_ADDR brings together: they train as one and end as one."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nanochat.tracking.keys import LOSS
from nanochat.tracking.metrics import read
from nanochat.training.session import metrics_path
from nanochat.workspace import Workspace

FLAGS = shlex.split(
    """
    train base --run run --model-tag tiny --depth 1 --aspect-ratio 32 --head-dim 16 --sequence-len 32
    --lanes 4 --total-batch-size 256 --eval-tokens 256 --dtype float32 --wandb disabled --log-every 1
    """
)

Start = Callable[..., "subprocess.Popen[str]"]


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


@pytest.fixture
def start_node(prepared_workspace: Workspace) -> Iterator[Start]:
    """Start the one rank of a node; what is left of it is killed."""
    port, started = free_port(), []

    def begin(node: int, *flags: str, nodes: int = 2) -> "subprocess.Popen[str]":
        place = {"RANK": str(node), "WORLD_SIZE": str(nodes), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
        process = subprocess.Popen(
            [sys.executable, "-m", "nanochat", *FLAGS, *flags],
            env={**os.environ, **place, **address, "NANOCHAT_BASE_DIR": str(prepared_workspace.root)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def losses(workspace: Workspace, model_tag: str) -> list[float]:
    return [row[LOSS] for row in read(metrics_path(workspace, "run", "base", model_tag)) if LOSS in row]


def test_two_nodes_train_as_one_with_accumulation(start_node: Start, prepared_workspace: Workspace) -> None:
    steps = ["--num-steps", "4", "--device-batch-size", "4"]
    for process in [start_node(0, *steps), start_node(1, *steps)]:
        errors = process.communicate(timeout=100)[1]
        assert process.returncode == 0, errors
    alone = start_node(0, *steps, "--model-tag", "alone", nodes=1)
    errors = alone.communicate(timeout=100)[1]
    assert alone.returncode == 0, errors
    together, expected = losses(prepared_workspace, "tiny"), losses(prepared_workspace, "alone")
    assert len(together) == 4
    # Another order of summation, and so other last bits.
    assert together == pytest.approx(expected, rel=1e-3)
    # The first step has seen no optimizer yet, so the batch alone decides its loss.
    assert together[0] == pytest.approx(expected[0], rel=1e-6)


def test_a_signal_to_one_node_stops_both_at_the_same_step(start_node: Start, prepared_workspace: Workspace) -> None:
    nodes = [start_node(node, "--num-steps", "100000", "--device-batch-size", "4") for node in range(2)]
    wait_for_step(prepared_workspace, nodes, 3)
    nodes[1].send_signal(signal.SIGUSR1)
    errors = [process.communicate(timeout=60)[1] for process in nodes]
    assert [process.returncode for process in nodes] == [75, 75], errors
    stopped = [line.partition(" on ")[0] for error in errors for line in error.splitlines() if " stopped at " in line]
    assert len(stopped) == 2
    assert stopped[0] == stopped[1]


def test_a_node_that_dies_ends_the_other_with_one_line(start_node: Start, prepared_workspace: Workspace) -> None:
    nodes = [start_node(node, "--num-steps", "100000", "--device-batch-size", "4") for node in range(2)]
    wait_for_step(prepared_workspace, nodes, 3)
    nodes[1].kill()
    errors = nodes[0].communicate(timeout=60)[1]
    assert nodes[0].returncode == 1
    assert "nanochat: rank 0 lost another rank: " in errors.splitlines()[-1]
    assert "the same command carries on" in errors.splitlines()[-1]
    assert "Traceback" not in errors


def wait_for_step(workspace: Workspace, nodes: "list[subprocess.Popen[str]]", step: int) -> None:
    """Wait until the run has taken some steps."""
    heartbeat: Path = workspace.run("run") / "heartbeat.json"
    while not heartbeat.exists() or json.loads(heartbeat.read_text()).get("step", 0) < step:
        assert all(node.poll() is None for node in nodes), [node.communicate() for node in nodes]
        time.sleep(0.02)

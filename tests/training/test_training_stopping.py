"""A stop signal ends a command soon, wherever it is, and loses nothing."""

import contextlib
import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat.checkpoint.folders import list_steps
from nanochat.checkpoint.store import load_checkpoint
from nanochat.config import TrainBaseConfig
from nanochat.errors import StoppedForRequeueError, StopSignal
from nanochat.model.gpt import GPT
from nanochat.pipeline import stopped_in
from nanochat.runtime import Runtime
from nanochat.training.base import train_base
from nanochat.training.stopping import StopRequest, received, stops_at_once
from nanochat.workspace import Workspace

CPU = Runtime(torch.device("cpu"), torch.float32)
TINY = shlex.split(
    """
    --depth 1 --aspect-ratio 32 --head-dim 16 --sequence-len 32 --lanes 4 --total-batch-size 128
    --device-batch-size 4 --eval-tokens 256 --dtype float32 --wandb disabled
    """
)


def send(*numbers: signal.Signals) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_outside_of_the_loop_a_signal_raises_once_however_often_it_comes(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stops_at_once():
        with pytest.raises(StopSignal, match=number.name):
            send(number)
        send(number, signal.SIGTERM)
        assert received() == number.name
    assert signal.getsignal(number) == before
    with stops_at_once():
        assert received() is None


def test_a_second_signal_does_not_kill_a_command_on_its_way_out() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        with pytest.raises(StopSignal), stops_at_once(last=True):
            send(signal.SIGUSR1)
        send(signal.SIGUSR1, signal.SIGTERM)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_no_handler_of_errors_takes_a_stop_for_one() -> None:
    assert not issubclass(StopSignal, Exception)
    assert issubclass(StopSignal, KeyboardInterrupt)


def test_in_the_loop_a_signal_waits_while_there_is_something_to_save() -> None:
    with stops_at_once():
        with StopRequest() as stop:
            stop.defers = True
            send(signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM)
            assert stop.signal_name == received() == "SIGUSR1"
            with pytest.raises(StopSignal, match="SIGUSR1"):
                stop.defers = False
        with pytest.raises(StopSignal, match="SIGTERM"):
            send(signal.SIGTERM)


def test_in_the_loop_a_signal_ends_the_command_where_all_is_saved() -> None:
    with stops_at_once(), StopRequest() as stop:
        stop.defers = False
        with pytest.raises(StopSignal, match="SIGTERM"):
            send(signal.SIGTERM)
        send(signal.SIGTERM)


def test_ctrl_c_where_all_is_saved_is_a_ctrl_c() -> None:
    with stops_at_once(), StopRequest() as stop:
        stop.defers = False
        with pytest.raises(KeyboardInterrupt) as interrupt:
            send(signal.SIGINT)
        assert not isinstance(interrupt.value, StopSignal)


def test_a_library_that_did_not_ask_for_it_is_never_ended() -> None:
    with StopRequest() as stop:
        stop.defers = False
        send(signal.SIGTERM)
        assert stop.signal_name == "SIGTERM"


@pytest.mark.parametrize("call", ["time.sleep(60)", "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"])
def test_a_command_that_takes_no_notice_is_ended_all_the_same(call: str, tmp_path: Path) -> None:
    # One that takes every exception for its own, and one that is in C for longer than anybody waits.
    script = f"""
import hashlib, sys, time
from pathlib import Path
from nanochat.training import stopping
from nanochat.training.heartbeat import beating
stopping.GRACE_SECONDS = 0.5
with stopping.stops_at_once(), beating(Path(sys.argv[1]), "tokenizer"):
    while True:
        try:
            print("ready", flush=True)
            {call}
        except BaseException:
            pass
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    errors = process.communicate(timeout=30)[1]
    assert process.returncode == 75
    assert errors == "nanochat: stopped by SIGTERM; the same command carries on\n"
    assert json.loads((tmp_path / "heartbeat.json").read_text())["state"] == "stopped"


def test_a_forked_child_dies_of_a_signal_and_its_parent_hears_nothing() -> None:
    with stops_at_once():
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writer, b"ready")
            time.sleep(60)
            os._exit(0)
        os.read(reader, 5)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        assert received() is None


CONFIG = TrainBaseConfig(
    depth=1,
    aspect_ratio=32,
    head_dim=16,
    sequence_len=32,
    model_tag="tiny",
    num_steps=6,
    total_batch_size=128,
    device_batch_size=4,
    lanes=4,
    eval_every=2,
    eval_tokens=256,
    save_every=2,
    dtype="float32",
    wandb="disabled",
)


def stop_at_call(monkeypatch: pytest.MonkeyPatch, method: str, call: int) -> None:
    """Have this process receive SIGTERM in the given call, from 1, of a method of the model."""
    original, calls = getattr(GPT, method), itertools.count(1)

    def counting(self: GPT, *arguments: Any) -> torch.Tensor:
        if next(calls) == call:
            send(signal.SIGTERM)
        result: torch.Tensor = original(self, *arguments)
        return result

    monkeypatch.setattr(GPT, method, counting)


def weights(workspace: Workspace) -> dict[str, torch.Tensor]:
    return load_checkpoint(workspace.checkpoints("base", "tiny"), 6, "").model


@pytest.mark.parametrize(
    ("method", "call", "error", "saved"),
    [
        # The first step, which may be compiling: nothing is trained yet, so nothing is written.
        ("forward", 1, StopSignal, []),
        # Another step: what is trained since the last checkpoint is saved.
        ("forward", 3, StoppedForRequeueError, [2, 3]),
        # The last step: the model is there, its evaluation is not.
        ("forward", 6, StoppedForRequeueError, [4, 6]),
        # An evaluation after a checkpoint, and the last one, of two batches each: nothing waits for their end.
        ("token_losses", 3, StopSignal, [2]),
        ("token_losses", 7, StopSignal, [4, 6]),
    ],
)
def test_wherever_training_is_stopped_it_carries_on_to_the_same_weights(
    method: str,
    call: int,
    error: type[BaseException],
    saved: list[int],
    prepared_workspace: Workspace,
    finished: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patched, stops_at_once():
        stop_at_call(patched, method, call)
        with pytest.raises(error):
            train_base(CONFIG, "run", prepared_workspace, CPU)
    assert list_steps(prepared_workspace.checkpoints("base", "tiny")) == saved
    outputs = train_base(CONFIG, "run", prepared_workspace, CPU)
    assert outputs["steps"] == 6
    found = weights(prepared_workspace)
    assert all(torch.equal(found[name], value) for name, value in finished.items())


@pytest.fixture(scope="module")
def finished(_prepared_workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights of a run that nothing happened to."""
    workspace = Workspace(Path(shutil.copytree(_prepared_workspace, tmp_path_factory.mktemp("finished") / "w")))
    train_base(CONFIG, "run", workspace, CPU)
    return weights(workspace)


class Command:
    """A `nanochat` command that runs while a test looks at it."""

    def __init__(self, workspace: Workspace, *arguments: str, **environment: str) -> None:
        self.heartbeat = workspace.run("run") / "heartbeat.json"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "nanochat", *arguments],
            env={**os.environ, "NANOCHAT_BASE_DIR": str(workspace.root), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """Wait for something, unless the command ends before."""
        while not ready():
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.005)

    def is_in(self, stage: str, *states: str) -> bool:
        """Whether the heartbeat says so."""
        try:
            beat = json.loads(self.heartbeat.read_text())
        except FileNotFoundError:
            return False
        return beat["stage"] == stage and beat["state"] in states

    def listens(self) -> bool:
        """Whether it handles SIGTERM, which it does long before torch is imported."""
        caught = Path(f"/proc/{self.process.pid}/status").read_text().partition("SigCgt:")[2].split()[0]
        return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)

    def stop(self, number: signal.Signals) -> tuple[int, str]:
        """Send a signal twice. Returns exit code and stderr."""
        self.process.send_signal(number)
        self.process.send_signal(number)
        errors = self.process.communicate(timeout=60)[1]
        return self.process.returncode, errors


@pytest.fixture
def start(prepared_workspace: Workspace) -> Iterator[Callable[..., Command]]:
    """Start a command; whatever is left of it is killed."""
    started: list[Command] = []

    def begin(*arguments: str, **environment: str) -> Command:
        started.append(Command(prepared_workspace, *arguments, **environment))
        return started[-1]

    yield begin
    for command in started:
        command.process.kill()
        command.process.communicate()


def test_a_signal_while_a_command_starts_up_ends_it_with_one_line(start: Callable[..., Command]) -> None:
    command = start("train", "base", "--run", "run", *TINY, "--num-steps", "3")
    command.wait_until(command.listens)
    assert command.stop(signal.SIGTERM) == (75, "nanochat: stopped by SIGTERM; the same command carries on\n")


HIDES = """
import os, signal, sys, time
from nanochat import cli

def hide() -> None:
    try:
        if sys.argv[1] == "stopped":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)
    except BaseException:
        pass
    raise ValueError("could not determine the shape")

cli.COMMANDS["hide"] = hide
cli.main(["hide"])
"""


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [("stopped", 75, "stopped by SIGTERM; the same command carries on"), ("failed", 1, "unexpected ValueError")],
)
def test_an_error_that_has_taken_the_place_of_a_stop_is_one(how: str, code: int, said: str) -> None:
    """As torch.tensor's does when the signal comes while it asks Python for something."""
    done = subprocess.run([sys.executable, "-c", HIDES, how], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, said in done.stderr) == (code, True)


def lose_a_stop_in_eval(error: Exception) -> None:
    with stops_at_once(), stopped_in("eval"):
        with contextlib.suppress(StopSignal):
            signal.raise_signal(signal.SIGUSR1)
        raise error


def test_an_error_in_a_stage_that_has_taken_the_place_of_a_stop_names_the_stage() -> None:
    with pytest.raises(StoppedForRequeueError, match="stopped by SIGUSR1 in stage eval"):
        lose_a_stop_in_eval(ValueError("could not determine the shape"))
    with pytest.raises(OSError, match="disk"):
        lose_a_stop_in_eval(OSError("the disk is full"))


def test_a_signal_in_an_evaluation_ends_the_run_there_and_the_same_command_finishes_it(
    start: Callable[..., Command],
) -> None:
    tasks = "--eval.tasks arithmetic --eval.max-problems 40 --eval.max-new-tokens 24"
    arguments = f"speedrun --run run --stages base,eval --num-steps 2 {tasks}".split() + TINY
    command = start(*arguments)
    command.wait_until(lambda: command.is_in("eval", "evaluating"))
    code, errors = command.stop(signal.SIGUSR1)
    assert code == 75, errors
    assert errors.splitlines()[-1] == "nanochat: stopped by SIGUSR1 in stage eval — the same command carries on"
    assert "Traceback" not in errors
    assert command.is_in("eval", "stopped")
    again = start(*arguments)
    output, errors = again.process.communicate(timeout=120)
    assert again.process.returncode == 0, errors
    assert output.count("already done") == 1
    assert again.is_in("eval", "finished")

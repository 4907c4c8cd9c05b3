"""Device, threads, random state, and what ranks agree on."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

import nanochat.runtime as runtime_module
from distributed import RankFailedError, run_distributed
from nanochat.errors import DataError, PreflightError, StoppedWithMainError, UsageError
from nanochat.identity import usable_cores
from nanochat.runtime import (
    choose_compute_dtype,
    from_main,
    gather_from_ranks,
    grow_memory_in_place,
    random_state,
    restore_random_state,
    run_on_main,
    set_cpu_threads,
    start_runtime,
)
from nanochat.training.stopping import StopRequest
from toolchain import needs_compiler

CPU = torch.device("cpu")


def test_a_restored_random_state_draws_the_same_again() -> None:
    state = random_state(CPU)
    first = torch.rand(5)
    torch.rand(100)
    restore_random_state(state, CPU)
    assert torch.equal(torch.rand(5), first)


def test_an_explicit_dtype_is_taken_and_auto_is_what_the_cpu_is_fast_at(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_compute_dtype(CPU, "float32") == torch.float32
    assert choose_compute_dtype(CPU, "bfloat16") == torch.bfloat16
    for fast, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(runtime_module, "cpu_has_fast_bfloat16", lambda fast=fast: fast)
        assert choose_compute_dtype(CPU, "auto") == expected


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="sees no GPU"), start_runtime("cuda"):
        pass


@pytest.mark.parametrize(
    ("environment", "ranks", "expected"),
    [
        ({}, 1, usable_cores()),
        ({}, 64, 1),
        ({"OMP_NUM_THREADS": "3"}, 1, 3),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, 1, usable_cores()),
        ({"OMP_NUM_THREADS": "3", "TORCHELASTIC_RUN_ID": "x"}, 1, 3),
    ],
)
def test_ranks_share_the_usable_cores_unless_told_otherwise(
    environment: dict[str, str], ranks: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    for name in ("OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    try:
        torch.set_num_threads(3)
        set_cpu_threads(ranks)
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"])
def test_how_torch_holds_memory_is_set_unless_somebody_has(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {})
    grow_memory_in_place()
    assert os.environ == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    monkeypatch.setattr(os, "environ", {name: ""})
    grow_memory_in_place()
    assert os.environ == {name: ""}


def test_one_process_needs_no_group() -> None:
    assert gather_from_ranks("x") == ["x"]
    assert from_main("x") == "x"
    assert run_on_main(lambda: "x") == "x"
    assert not dist.is_initialized()


def slow_work() -> str:
    time.sleep(1)
    return "made"


def wait_for_main() -> tuple[object, float]:
    runtime_module.SECONDS_BETWEEN_SIGNS = 0.2
    dist.barrier()
    started = time.monotonic()
    result = run_on_main(slow_work)
    return result, time.monotonic() - started


def test_ranks_wait_for_work_of_rank_0_beyond_any_one_signal() -> None:
    results = run_distributed(wait_for_main, 3)
    assert [result for result, _ in results] == ["made", None, None]
    # Longer than one sign, and by far less than the work, as a rank may come late.
    assert all(seconds >= 0.4 for _, seconds in results)


def main_fails() -> str:
    def work() -> None:
        raise DataError("broken", "mend it")

    try:
        run_on_main(work)
    except StoppedWithMainError:
        return "stopped with main"
    except DataError as error:
        return str(error)
    return "nothing"


def test_a_failure_of_rank_0_ends_the_others_instead_of_leaving_them_waiting() -> None:
    try:
        results = run_distributed(main_fails, 3)
    except RankFailedError as error:
        pytest.fail(str(error))
    assert results == ["broken — mend it", "stopped with main", "stopped with main"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_signal_sent_twice_still_leaves_time_to_save(number: signal.Signals) -> None:
    handler = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.signal_name is None
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        assert stop.signal_name == number.name
    assert signal.getsignal(number) == handler


def test_a_second_ctrl_c_ends_at_once() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal_name == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.mark.parametrize(
    ("variables", "error", "said"),
    [
        ({"RANK": ""}, UsageError, "not whole numbers"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, UsageError, "RANK=2 WORLD_SIZE=2"),
        ({"LOCAL_WORLD_SIZE": "0"}, UsageError, "no such rank"),
        ({"WORLD_SIZE": "2"}, PreflightError, "MASTER_ADDR"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, PreflightError, "MASTER_PORT"),
        # Rank 1 never comes.
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "free"}, PreflightError, "start all 2 ranks"),
        # Rank 0 never comes.
        (
            {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "free"},
            PreflightError,
            "rank 1 of 2 did not meet the others at 127.0.0.1:",
        ),
        (
            {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "taken"},
            PreflightError,
            "another MASTER_PORT",
        ),
    ],
)
def test_ranks_that_do_not_meet_are_told_in_one_line_why(
    variables: dict[str, str], error: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime_module, "RENDEZVOUS_TIMEOUT", timedelta(seconds=1))
    with socket.socket() as listener:
        listener.bind(("", 0))
        port = listener.getsockname()[1]
        if variables.get("MASTER_PORT") == "taken":
            listener.listen()
        else:
            listener.close()
        for name in LAUNCHER:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, str(port) if name == "MASTER_PORT" else value)
        with pytest.raises(error, match=re.escape(said)) as caught, start_runtime("cpu"):
            pass
    assert len(str(caught.value).splitlines()) == 1
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("last", "error", "said"),
    [
        ("Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 9000", UsageError, "shares its GPU"),
        ("socketStartConnect: Connect to 10.0.0.2 failed", PreflightError, "socketStartConnect: Connect to 10.0.0.2"),
        ("", PreflightError, "NCCL error in: NCCLUtils.cpp:94"),
    ],
)
def test_why_nccl_could_not_begin_is_told(
    last: str, error: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As torch says it, where no GPU is at hand to say it.
    text = f"NCCL error in: NCCLUtils.cpp:94, invalid usage\nncclInvalidUsage: This is how it is.\nLast error:\n{last}"

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError(text)

    monkeypatch.setattr(runtime_module, "rendezvous", refuse)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(error, match=re.escape(said)), start_runtime("cpu"):
        pass


TF32 = """
import torch
from nanochat.runtime import allow_tf32
allow_tf32()
# What Inductor reads; after a mixture of PyTorch's two ways to set it, reading raises.
assert torch.get_float32_matmul_precision() == "high"
torch.compile(lambda a, b: a @ b)(torch.rand(64, 64), torch.rand(64, 64))
"""


@needs_compiler
def test_tf32_is_set_in_one_way_that_the_compiler_can_read() -> None:
    subprocess.run([sys.executable, "-c", TF32], check=True)

"""When a stage is compiled."""

import io
import os
from unittest.mock import patch

import pytest
import torch

from distributed import run_distributed
from nanochat.config import MachineConfig
from nanochat.runtime import Runtime
from nanochat.tracking.console import Console
from nanochat.training import session
from nanochat.training.session import COMPILING_PAYS_AFTER_SECONDS, EAGER_FLOPS_PER_CORE, compiles

CPU = torch.device("cpu")


def flops_of(seconds: float, threads: int) -> float:
    return seconds * threads * EAGER_FLOPS_PER_CORE


def test_a_stage_on_a_cpu_is_compiled_where_that_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "why_not_compile", lambda: None)
    auto, console, threads = MachineConfig(), Console(enabled=False), torch.get_num_threads()
    short = flops_of(0.9 * COMPILING_PAYS_AFTER_SECONDS, threads)
    long = flops_of(1.1 * COMPILING_PAYS_AFTER_SECONDS, threads)
    one, two = Runtime(CPU, torch.float32), Runtime(CPU, torch.float32, world_size=2)
    assert not compiles(auto, one, short, console)
    assert compiles(auto, one, long, console)
    assert not compiles(auto, two, long, console), "two share the work"
    assert compiles(auto, two, 2 * long, console)


def test_what_was_asked_for_goes_before_what_pays() -> None:
    runtime, console = Runtime(CPU, torch.float32), Console(enabled=False)
    assert compiles(MachineConfig(compile="on"), runtime, 1, console)
    assert not compiles(MachineConfig(compile="off"), runtime, 1e30, console)
    assert not compiles(MachineConfig(compile="off"), Runtime(torch.device("cuda"), torch.bfloat16), 1e30, console)
    assert compiles(MachineConfig(), Runtime(torch.device("cuda"), torch.bfloat16), 1, console)


def compiled_with_one_broken_node() -> tuple[bool, str]:
    rank = int(os.environ["RANK"])
    errors = io.StringIO()
    with patch.object(session, "why_not_compile", lambda: "no g++ here" if rank == 1 else None):
        runtime, console = Runtime(CPU, torch.float32, rank, 2), Console(rank == 0, errors=errors)
        compiled = compiles(MachineConfig(), runtime, 1e30, console)
    return compiled, errors.getvalue()


def test_all_ranks_train_uncompiled_where_one_cannot_compile() -> None:
    (first, said), (second, _) = run_distributed(compiled_with_one_broken_node, 2)
    assert not first
    assert not second
    assert "compiling fails here: no g++ here" in said

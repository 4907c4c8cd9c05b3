"""TF32 is set in one way, and somebody else's other way is noticed before torch.compile fails on it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from toolchain import needs_compiler

Run = Callable[..., "subprocess.CompletedProcess[str]"]

on_the_pinned_torch = pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="not the pinned torch")

NEW = "torch.backends.cuda.matmul.fp32_precision = 'tf32'"
IEEE = "torch.backends.cuda.matmul.fp32_precision = 'ieee'"
OLD = "torch.set_float32_matmul_precision('high')"


def outcome(program: str, **environment: str) -> str:
    """The last line that a program prints in a process of its own, for what torch was told holds for its process."""
    command = [sys.executable, "-c", f"import torch\n{program}"]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


CRASH = f"""
import torch._inductor.config as config
from nanochat.runtime import allow_tf32, tf32_conflict
config.freezing = config.max_autotune = True
compiled = torch.compile(torch.nn.Linear(64, 64).eval())
errors = []
{NEW}
noticed = tf32_conflict() is not None
with torch.no_grad():
    for _ in range(2):
        try:
            compiled(torch.rand(8, 64))
        except Exception as error:
            errors.append(str(error))
            torch.compiler.reset()
        allow_tf32()
print(noticed, len(errors), "mix of the legacy and new APIs" in errors[0])
"""


@needs_compiler
@on_the_pinned_torch
def test_the_crash_of_inductor_on_a_mixture_is_noticed_before_and_gone_with_our_way() -> None:
    assert outcome(CRASH) == "True 1 True"


# What is written, and which of torch's switches is then named, if any.
WRITES = {
    "pass": "",
    OLD: "",
    "torch.backends.cuda.matmul.allow_tf32 = True": "",
    IEEE: "",
    f"{NEW}; {OLD}": "",
    f"{OLD}; {NEW}": "",
    NEW: "torch.backends.cuda.matmul.fp32_precision='tf32'",
    "torch.backends.fp32_precision = 'tf32'": "torch.backends.fp32_precision='tf32'",
    "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'": "torch.backends.mkldnn.matmul.fp32_precision='bf16'",
    f"{OLD}; {IEEE}": "torch.backends.cuda.matmul.fp32_precision='ieee'",
}

EACH = """
import json
from nanochat.runtime import tf32_conflict
found = []
for write in {writes!r}:
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision = "none"
    torch.backends.cuda.matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"
    assert tf32_conflict() is None
    exec(write)
    found.append(tf32_conflict())
print(json.dumps(found))
"""


def test_only_settings_that_torch_cannot_read_back_are_a_conflict_and_they_are_named() -> None:
    found = json.loads(outcome(EACH.format(writes=list(WRITES))))
    for (write, named), conflict in zip(WRITES.items(), found, strict=True):
        assert bool(conflict) == bool(named), write
        assert named in (conflict or ""), write


def test_a_variable_that_takes_part_is_named() -> None:
    program = f"{IEEE}\nfrom nanochat.runtime import tf32_conflict\nprint(tf32_conflict())"
    assert "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1" in outcome(program, TORCH_ALLOW_TF32_CUBLAS_OVERRIDE="1")


@pytest.mark.parametrize("write", [NEW, "setattr(torch.backends, 'fp32_precision', 'tf32')"])
def test_a_run_is_refused_with_the_line_that_set_the_other_way(run_command: Run, tmp_path: Path, write: str) -> None:
    culprit = tmp_path / "sitecustomize.py"
    culprit.write_text(f"import torch\nif torch.backends.fp32_precision == 'none':\n    {write}\n", encoding="utf-8")
    result = run_command("train", "base", "--run", "x", PYTHONPATH=str(tmp_path))
    assert result.returncode == 3, result.stderr
    assert f"set by {culprit}:3 — remove" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1

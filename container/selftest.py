"""`apptainer test`: whether the image holds what its lock says, compiles and trains on this machine.

Needs no network, no home folder and no GPU; uses the GPU where there is one. What it writes goes to a temporary folder:
while an image is being built nothing else can be written, and compiled code belongs into no image.
"""

import importlib
import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
# What is there without being locked: pip comes with venv.
UNLOCKED = {"pip", "nanochat-hpc"}
MODULES = """torch numpy pyarrow.parquet rustbpe tiktoken tokenizers safetensors.torch tyro rich psutil zstandard
    matplotlib.pyplot wandb datasets huggingface_hub yaml"""
# Training at toy size; the flags are documented in docs/reference/commands.md.
TRAINING = shlex.split(
    """speedrun --run selftest --stages corpus tokenizer tokenize base --vocab-size 320 --depth 2 --aspect-ratio 16
    --head-dim 16 --sequence-len 64 --lanes 4 --pool-size 8 --num-steps 8 --total-batch-size 512 --device-batch-size 8
    --eval-tokens 1024 --workers 1 --dtype float32 --compile off --wandb offline"""
)


def normalised(name: str) -> str:
    """A distribution's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def check_packages() -> str:
    """What is installed is what is locked, no less, no more and in no other version."""
    lock = (HERE / "requirements.lock").read_text(encoding="utf-8")
    locked = {normalised(name): version for name, version in re.findall(r"^([\w.-]+)==(\S+)", lock, re.MULTILINE)}
    installed = {normalised(found.name): found.version for found in importlib.metadata.distributions()}
    for name in UNLOCKED - locked.keys():
        installed.pop(name, None)
    differing = sorted({name for name, _ in locked.items() ^ installed.items()})
    assert locked, "the lock names nothing"
    assert not differing, f"not as locked: {[(name, locked.get(name), installed.get(name)) for name in differing]}"
    return f"{len(locked)} packages as locked"


def check_imports() -> str:
    """Every package that nanochat uses can be imported, and comes from the image."""
    for name in MODULES.split():
        origin = importlib.import_module(name).__file__ or ""
        assert Path(origin).is_relative_to(sys.prefix), f"{name} comes from {origin}"
    return f"{len(MODULES.split())} modules import"


def check_matmul_precision() -> str:
    """One way of allowing TF32 is in use: reading the other, as Inductor does, raises where both were."""
    import torch

    from nanochat.runtime import allow_tf32

    allow_tf32()
    assert torch.backends.cuda.matmul.allow_tf32
    return f"float32 matmuls in {torch.get_float32_matmul_precision()!r} precision, said one way only"


def check_compiling() -> str:
    """torch.compile finds the compilers and headers it needs: for C++ on a CPU, on a GPU for Triton's C as well.

    A function, not a model: that takes a minute where this takes seconds, and uses the same tools.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = torch.linspace(-1, 1, 64, device=device, requires_grad=True)
    outputs = torch.compile(lambda x: (x.sin() * 2).sum())(inputs)
    outputs.backward()
    assert inputs.grad is not None
    assert torch.allclose(inputs.grad, inputs.detach().cos() * 2)
    return f"compiled code runs on {device}"


def check_training(folder: Path) -> str:
    """A toy model trains, from the tokenizer to a checkpoint."""
    texts = [
        json.dumps({"text": f"{number} plus {number % 7} is {number + number % 7}. " * 3}) for number in range(400)
    ]
    (folder / "texts").mkdir()
    (folder / "texts/texts.jsonl").write_text("\n".join(texts) + "\n", encoding="utf-8")
    environment = os.environ | {"NANOCHAT_BASE_DIR": str(folder / "workspace"), "HF_HUB_OFFLINE": "1"}
    command = [str(Path(sys.executable).parent / "nanochat"), *TRAINING, "--data", str(folder / "texts")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"training failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert list(folder.glob("workspace/base_checkpoints/*/step_000008/manifest.json")), done.stdout
    return "a toy model trained"


def main() -> None:
    """Run every check and say what each found; an AssertionError names what is wrong."""
    with tempfile.TemporaryDirectory(prefix="nanochat-selftest-") as folder:
        # Compilers, torch and W&B take this for the place they may write to.
        os.environ["TMPDIR"] = tempfile.tempdir = folder
        os.environ["MPLCONFIGDIR"] = folder
        for check in (check_packages, check_imports, check_matmul_precision, check_compiling):
            print(f"ok: {check()}", flush=True)
        print(f"ok: {check_training(Path(folder))}", flush=True)


if __name__ == "__main__":
    main()

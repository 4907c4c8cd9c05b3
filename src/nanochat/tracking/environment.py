"""Where a run ran: commit, hardware, software, job. Enough to trust its figures, or to make them again."""

import os
import platform
import sys
from pathlib import Path
from typing import Any

from nanochat.identity import (
    IMAGE_MANIFEST,
    describe_commit,
    describe_image,
    installed_version,
    output_of,
    usable_cores,
)

PACKAGES = (
    "nanochat-hpc",
    "torch",
    "numpy",
    "pyarrow",
    "rustbpe",
    "tiktoken",
    "tokenizers",
    "safetensors",
    "wandb",
    "matplotlib",
)

SLURM_VARIABLES = {
    "job_id": "SLURM_JOB_ID",
    "partition": "SLURM_JOB_PARTITION",
    "num_nodes": "SLURM_JOB_NUM_NODES",
    "nodes": "SLURM_JOB_NODELIST",
}


def describe_environment(manifest: Path = IMAGE_MANIFEST) -> dict[str, Any]:
    """Describe this process's machine as JSON-able values; what is not known is left out.

    Memory is in bytes. Host names are left out, so that two nodes of one kind describe themselves alike.
    """
    facts = {
        "git": describe_commit(manifest),
        "image": describe_image(manifest),
        "cpu": _cpu(),
        "memory_bytes": _memory_bytes(),
        "gpus": _gpus(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "packages": _packages(),
        "slurm": {name: os.environ[variable] for name, variable in SLURM_VARIABLES.items() if variable in os.environ},
        "container": os.environ.get("APPTAINER_CONTAINER") or os.environ.get("SINGULARITY_CONTAINER"),
    }
    return {name: fact for name, fact in facts.items() if fact}


def _cpu() -> dict[str, Any]:
    """The CPU's name, and how many cores this process may use, which a Slurm job's share limits."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line for line in cpuinfo.read_text(errors="replace").splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    return {"model": model, "cores": usable_cores()}


def _memory_bytes() -> int:
    import psutil

    return int(psutil.virtual_memory().total)


def _gpus() -> list[dict[str, Any]]:
    """The GPUs this process can use.

    torch knows best (CUDA_VISIBLE_DEVICES, MIG, AMD), but importing it takes seconds, so it is asked only
    where it is already loaded, as it is in any process that trained.
    """
    torch = sys.modules.get("torch")
    if torch is not None:
        properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        return [{"name": device.name, "memory_bytes": int(device.total_memory)} for device in properties]
    listed = output_of("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits") or ""
    rows = [line.rpartition(",") for line in listed.splitlines()]
    return [
        {"name": name.strip(), "memory_bytes": int(mebibytes) * 2**20}
        for name, _, mebibytes in rows
        if mebibytes.strip().isdigit()
    ]


def _packages() -> dict[str, str]:
    return {package: version for package in PACKAGES if (version := installed_version(package))}

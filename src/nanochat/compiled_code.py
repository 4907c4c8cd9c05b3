"""Where torch.compile keeps what it has compiled, and whether it can compile for this CPU."""

import os
import platform
import struct
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

# Whoever has not written to a file for so long is not about to finish it.
SECONDS_OF_A_LINKER = 60.0
PROBE_SECONDS = 300
PROBE = """
import torch
try:
    torch.compile(torch.sin)(torch.ones(8))
except Exception as error:
    # Dynamo keeps what Inductor has raised beside its own.
    error = getattr(error, "inner_exception", None) or error.__cause__ or error
    print(f"{type(error).__name__}: {error}")
"""


def keep_compiled_code(folder: Path) -> None:
    """Have Inductor and Triton keep what they compile below `folder`, unless their own variables name a place.

    Their default is /tmp of the node, where the next job does not find it. PyTorch writes its default into the same
    variable as soon as anything looks it up, `torch.device("meta")` for one, so this comes before all else. What is
    made for one kind of CPU may use instructions that another has not, and Inductor's keys do not tell them apart.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor" / cpu_kind()))
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))
    # PyTorch is wary of autograd functions such as our loss, though their traced bodies are a part of the key. Without
    # this a warm start traces the whole backward pass anew: 11.7 s in place of 7 at d4 (benchmarks/LOG.md).
    os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD", "1")


def cpu_kind(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """A short name of what this CPU's instructions are, the same on all machines that have the same."""
    facts = [platform.machine()]
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(errors="replace").splitlines()
        # x86 names them "flags", ARM "Features"; the first core stands for all.
        facts += [next((line for line in lines if line.startswith(name)), "") for name in ("flags", "Features")]
    return f"{facts[0]}-{sha256(' '.join(facts).encode()).hexdigest()[:8]}"


def remove_cut_off_code() -> None:
    """Remove what a compiler that was killed has left half-written, which would end the next process with SIGBUS.

    Linkers write under a file's final name, and Inductor takes a file that is there for a whole one.
    """
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if folder is None or sys.platform != "linux":
        return
    for path in Path(folder).rglob("*.*o"):
        if path.suffix in (".so", ".o") and _is_cut_off(path):
            path.unlink(missing_ok=True)


def _is_cut_off(path: Path) -> bool:
    """Whether a file lacks its end, where 64-bit ELF has its table of sections, and nobody is writing it now."""
    try:
        with path.open("rb") as stream:
            header = stream.read(64)
        status = path.stat()
    except FileNotFoundError:
        return False
    if time.time() - status.st_mtime < SECONDS_OF_A_LINKER:
        return False
    if len(header) < 64:
        return True
    (table,) = struct.unpack_from("<Q", header, 0x28)
    size, number = struct.unpack_from("<HH", header, 0x3A)
    return header[:4] != b"\x7fELF" or status.st_size < table + size * number


def why_not_compile() -> str | None:
    """Why torch.compile cannot make code for this CPU, found by having it make some; None if it can.

    It needs a C++ compiler, Python's headers, and room in two folders. What of that is missing shows in many ways, as
    errors of several kinds, a hang, or a signal; so it is tried in a process of its own.
    """
    command = [sys.executable, "-c", PROBE]
    # Not to import what happens to lie in the current folder.
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"it takes more than {PROBE_SECONDS} s"
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return f"it ends with code {done.returncode} {last}".strip()
    lines = done.stdout.splitlines()
    # Of a compiler's long output the line that says why; the first is what PyTorch makes of it.
    telling = (line for line in lines[1:] if "error: " in line or "No space left" in line)
    return next(telling, *lines[:1]).strip()[:300] if lines else None

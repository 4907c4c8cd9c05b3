"""What this machine, or the image on it, offers for training: each thing looked at is OK, worth a note, or a PROBLEM.

Each check is a function of what was seen, so that a test can show it a machine that it does not have. `examine` does
the looking. It creates no file, shows no key, and goes on when a look fails: a broken machine is what it is for.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from nanochat.cluster.findings import (
    Finding,
    State,
    check_caches,
    check_folder,
    check_wandb,
    looked_at,
    one_line,
)
from nanochat.identity import DISTRIBUTION, IMAGE_MANIFEST, output_of, read_image, usable_cores
from nanochat.workspace import Workspace

# What is compiled, and so may be there but not load; torch comes last, as it takes longest.
COMPILED_PACKAGES = ("rustbpe", "psutil", "tiktoken", "tokenizers", "safetensors", "pyarrow", "torch")

# The oldest driver for each major version of CUDA; newer minor versions run on it too.
# https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}

# torch.compile writes a precompiled header of 150 MB to the folder for temporary files, wherever its cache is.
TEMPORARY_BYTES = 2**28

WORKSPACE_BYTES = 2**30
WORKSPACE_BYTES_AT_EASE = 10 * 2**30

# These reach into every program, and a container that does not clear them takes them over from the host.
HOST_VARIABLES = ("PYTHONPATH", "PYTHONHOME", "LD_PRELOAD")

# Also for an image, in which nothing can be wrong but what comes from outside.
UNSHADOW = "unset PYTHONPATH; export PYTHONNOUSERSITE=1; and start in another folder"


@dataclass(frozen=True)
class Gpu:
    """A GPU as its driver describes it; capability is `9.0` of an H100."""

    name: str
    driver: str
    capability: str


def examine(
    manifest: Path = IMAGE_MANIFEST, *, expect_gpus: int | None = None, expect_driver: str | None = None
) -> list[Finding]:
    """Look at everything, in an order in which a cause stands before what follows from it.

    Args:
        manifest: the image's.
        expect_gpus: GPUs that there must be.
        expect_driver: the oldest driver that will do.
    """
    environment = os.environ
    container = environment.get("APPTAINER_CONTAINER") or environment.get("SINGULARITY_CONTAINER")
    findings = [Finding("container", container or "none")]
    image: dict[str, Any] = {}

    def look(subject: str, check: Callable[[], Finding | Iterable[Finding]]) -> None:
        findings.extend(looked_at(subject, check))

    def look_at_image() -> list[Finding]:
        image.update(read_image(manifest))
        shown = [f"{name} {image[name]}" for name in ("variant", "revision", "lock", "fingerprint") if name in image]
        return [Finding("image", ", ".join(shown))] if image else []

    look("image", look_at_image)
    if container:
        mounts = Path("/proc/self/mountinfo")
        look("binds", lambda: Finding("binds", ", ".join(binds(mounts.read_text(errors="replace"))) or "none"))
    look("home", lambda: check_home(environment))
    look("host variables", lambda: check_host_variables(environment))
    library = [Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")]
    look("import path", lambda: check_shadowing(sys.path, Path(sysconfig.get_path("purelib")), library))
    look("python", lambda: Finding("python", f"{platform.python_version()} ({sys.executable})"))
    look("packages", lambda: check_packages(required_packages(image), installed_packages(), bool(image)))
    look("imports", lambda: check_imports(COMPILED_PACKAGES, bool(image)))
    if "torch" in sys.modules:
        look("torch", lambda: _look_at_torch(environment, bool(container)))
    if expect_gpus is not None or expect_driver is not None:
        look("expected GPUs", lambda: _look_at_expected(expect_gpus, expect_driver))
    look("temporary files", check_temporary_folder)
    look("NANOCHAT_BASE_DIR", lambda: _look_at_workspace(environment))
    look("W&B", lambda: check_wandb(environment))
    return findings


def check_home(environment: Mapping[str, str]) -> Finding:
    """Whether there is a home folder; nanochat does without one, and then needs to be told where its files go."""
    home = environment.get("HOME", "")
    if home and os.access(home, os.R_OK | os.X_OK):
        return Finding("home", f"{home}{'' if os.access(home, os.W_OK) else ', read-only'}")
    fix = "export NANOCHAT_BASE_DIR=<a folder on scratch>"
    return Finding("home", f"{home or 'none'}: cannot be entered", "note", fix)


def check_host_variables(environment: Mapping[str, str]) -> Finding:
    """Whether a variable brings other code into every program."""
    found = [f"{name}={environment[name]}" for name in HOST_VARIABLES if environment.get(name)]
    if found:
        names = " ".join(name for name in HOST_VARIABLES if environment.get(name))
        return Finding("host variables", " ".join(found), "note", f"if anything fails: unset {names}")
    return Finding("host variables", f"{', '.join(HOST_VARIABLES)} are not set")


def check_shadowing(path: Sequence[str], own: Path, library: Sequence[Path]) -> Finding:
    """Whether packages are taken from somewhere else although this environment has them.

    Args:
        path: where modules are looked for, first match first (sys.path).
        own: where this environment's packages are.
        library: where Python's own modules are.
    """
    folders = [Path(entry or ".").absolute() for entry in path]
    before = folders[: folders.index(own)] if own in folders else []
    ours = _importable(own)
    for folder in before:
        hidden = [] if folder in library else sorted(ours & _importable(folder))
        if hidden:
            more = f" and {len(hidden) - 5} more" if len(hidden) > 5 else ""
            text = f"{folder} hides this environment's {', '.join(hidden[:5])}{more}"
            return Finding("import path", text, "PROBLEM", UNSHADOW)
    return Finding("import path", f"packages come from {own}")


def required_packages(image: Mapping[str, Any]) -> list[Requirement]:
    """What must be installed: exactly what the image was built with, or else what nanochat's metadata asks for."""
    if image:
        return [Requirement(entry) for entry in image.get("python", ())]
    asked = [Requirement(entry) for entry in importlib.metadata.requires(DISTRIBUTION) or ()]
    python = Requirement(f"python{importlib.metadata.metadata(DISTRIBUTION)['Requires-Python']}")
    return [python, *(each for each in asked if each.marker is None or each.marker.evaluate({"extra": ""}))]


def installed_packages() -> dict[str, str]:
    """The versions of what would be imported: of two installed copies the first on the path."""
    found = {"python": platform.python_version()}
    for distribution in importlib.metadata.distributions():
        # A half removed package has a folder of metadata without a name in it.
        if distribution.metadata["Name"] and distribution.metadata["Version"]:
            found.setdefault(canonicalize_name(distribution.name), distribution.version)
    return found


def check_packages(required: Sequence[Requirement], installed: Mapping[str, str], in_image: bool) -> Finding:
    """Whether what is installed is what is required."""
    wrong = []
    for each in required:
        version = installed.get(canonicalize_name(each.name))
        if version is None or not each.specifier.contains(version, prereleases=True):
            wrong.append((each, f"{each.name} {version or 'is missing'}{f', not {each.specifier}' if version else ''}"))
    whose = "the image's lock" if in_image else "what nanochat requires"
    if not wrong:
        return Finding("packages", f"{len(required)} as {whose}")
    mend = f"pip install {' '.join(shlex.quote(f'{each.name}{each.specifier}') for each, _ in wrong)}"
    text = f"not {whose}: {'; '.join(text for _, text in wrong)}"
    return Finding("packages", text, "PROBLEM", UNSHADOW if in_image else mend)


def check_imports(names: Sequence[str], in_image: bool) -> list[Finding]:
    """Whether packages load: those that do in one finding, each that does not in its own."""
    loaded, findings = [], []
    for name in names:
        try:
            importlib.import_module(name)
            loaded.append(name)
        except Exception as error:
            spec = importlib.util.find_spec(name)
            where = f" ({spec.origin})" if spec else ""
            text, mend = f"{name}{where} does not load: {one_line(error)}", f"pip install --force-reinstall {name}"
            findings.append(Finding("imports", text, "PROBLEM", UNSHADOW if in_image else mend))
    return [*([Finding("imports", f"{', '.join(loaded)} load")] if loaded else []), *findings]


def gpus_in(listing: str) -> list[Gpu]:
    """The GPUs in nvidia-smi's rows of name, driver and capability."""
    rows = [[cell.strip() for cell in line.rsplit(",", 2)] for line in listing.splitlines()]
    return [Gpu(*row) for row in rows if len(row) == 3]


def check_gpus(
    gpus: Sequence[Gpu],
    torch_cuda: str | None,
    torch_sees: int,
    architectures: Sequence[str],
    *,
    has_driver: bool,
    in_container: bool,
    hidden: bool,
) -> Finding:
    """Whether torch can use the GPUs that are here.

    Args:
        gpus: what nvidia-smi lists.
        torch_cuda: the CUDA version that torch was built for.
        torch_sees: GPUs that torch can use.
        architectures: what torch's kernels were compiled for, such as `sm_90`.
        has_driver: whether the kernel has NVIDIA's driver; that is seen from inside a container too.
        in_container: whether this is one.
        hidden: whether CUDA_VISIBLE_DEVICES hides all of them.
    """
    names = _counted([gpu.name for gpu in gpus])
    if hidden:
        return Finding("GPUs", f"{names or 'all'}, hidden by CUDA_VISIBLE_DEVICES", "note", "unset it to use them")
    if not gpus and torch_sees:
        return Finding("GPUs", f"{torch_sees}, as torch sees them")
    if not gpus and has_driver:
        fix = "give --nv to apptainer, in a job that has GPUs" if in_container else "ask Slurm for GPUs; see nvidia-smi"
        return Finding("GPUs", "NVIDIA's driver is here, but no GPU is seen", "PROBLEM" if torch_cuda else "note", fix)
    if not gpus:
        return Finding("GPUs", "none, so training uses the CPU")
    if torch_cuda is None:
        fix = "use the image's cuda variant, or a torch for CUDA; to ignore the GPUs: export CUDA_VISIBLE_DEVICES="
        return Finding("GPUs", f"{names}, but this torch is built for the CPU", "PROBLEM", fix)
    driver, oldest = gpus[0].driver, OLDEST_DRIVER.get(int(torch_cuda.partition(".")[0]))
    if not torch_sees:
        if oldest and driver.partition(".")[0].isdigit() and int(driver.partition(".")[0]) < oldest:
            text = f"{names} with driver {driver}, but CUDA {torch_cuda} needs {oldest} or newer"
            return Finding("GPUs", text, "PROBLEM", "use an image or a torch for an older CUDA, or a newer driver")
        fix = "the error of this says why: python -c 'import torch; torch.zeros(1).cuda()'"
        return Finding("GPUs", f"{names}, but torch can use none", "PROBLEM", fix)
    old = sorted({gpu.name for gpu in gpus if not has_kernels(gpu.capability, architectures)})
    if old:
        text = f"torch has no kernels for {', '.join(old)}; it has {' '.join(architectures)}"
        return Finding("GPUs", text, "PROBLEM", "use a torch for an older CUDA, or another GPU")
    return Finding("GPUs", f"{names}, driver {driver}")


def check_expected(expect_gpus: int | None, expect_driver: str | None, visible: int, listed: Sequence[Gpu]) -> Finding:
    """Whether there are as many GPUs as a job asked for, with a driver that is new enough.

    Args:
        expect_gpus: how many, no more and no fewer; None for any.
        expect_driver: the oldest driver; None for any.
        visible: GPUs that this process can use.
        listed: what nvidia-smi lists, whatever CUDA_VISIBLE_DEVICES says.
    """
    subject, driver = "expected GPUs", listed[0].driver if listed else "none"
    if expect_gpus is not None and visible != expect_gpus:
        text = f"{visible} can be used, {expect_gpus} were expected; nvidia-smi lists {len(listed)}"
        fix = "ask Slurm for as many, or tell its administrators of this node: scontrol show node $SLURMD_NODENAME"
        return Finding(subject, text, "PROBLEM", fix)
    if expect_driver is not None and _numbers(driver) < _numbers(expect_driver):
        text, fix = (
            f"driver {driver}, {expect_driver} or newer was expected",
            "another node, or an image for an older CUDA",
        )
        return Finding(subject, text, "PROBLEM", fix)
    return Finding(subject, f"{visible}, as expected{f', driver {driver}' if listed else ''}")


def has_kernels(capability: str, architectures: Sequence[str]) -> bool:
    """Whether a GPU of this capability runs code compiled for one of these architectures.

    Binary code (sm_MN) runs on the same major version from its minor on, portable code (compute_MN) on all later ones.
    """
    if not architectures or not re.fullmatch(r"\d+\.\d+", capability):
        return True
    major, minor = map(int, capability.split("."))
    for kind, number in re.findall(r"(sm|compute)_(\d+)", " ".join(architectures)):
        at = (int(number[:-1]), int(number[-1]))
        if at <= (major, minor) and (kind == "compute" or at[0] == major):
            return True
    return False


def check_cores(usable: int, machine: int, threads: str | None) -> Finding:
    """How many of the machine's cores this process may use."""
    text = f"{usable} of {machine} usable" + (f", OMP_NUM_THREADS={threads}" if threads else "")
    if usable == 1 < machine:
        return Finding("cores", text, "note", "in a job: ask for more with --cpus-per-task")
    return Finding("cores", text)


def check_bfloat16(fast: bool, on_gpu: bool) -> Finding:
    """Whether the CPU multiplies bfloat16 in hardware."""
    if fast:
        return Finding("bfloat16", "in this CPU's hardware")
    where = "float32 is used on it" if not on_gpu else "which matters only for training on it"
    return Finding("bfloat16", f"not in this CPU's hardware; {where}", "OK" if on_gpu else "note")


def check_tf32(conflict: str | None, precision: str) -> Finding:
    """Whether PyTorch's two ways to set TF32 are mixed."""
    if conflict:
        text = f"set in two ways, on which torch.compile fails: {conflict}"
        return Finding("TF32", text, "PROBLEM", "remove that setting, or use torch.set_float32_matmul_precision")
    return Finding("TF32", f"set in one way; float32 matmuls are {precision!r} until training starts")


def check_attention(installed: Mapping[str, bool], on_gpu: bool) -> Finding:
    """Which attention kernels there are beside PyTorch's; training tries them and says which it takes.

    Args:
        installed: whether each of them is there, by its name.
        on_gpu: whether there is a GPU that they could run on.
    """
    there = [name for name, is_there in installed.items() if is_there]
    text = f"{', '.join([*there, 'varlen', 'sdpa'])} to choose from"
    if there or not on_gpu:
        return Finding("attention", text)
    return Finding("attention", text, "note", "on Hopper or newer, maybe faster: pip install --pre flash-attn-4")


def check_compiler(compiler: str, headers: str, needed: bool) -> Finding:
    """Whether torch.compile finds a C++ compiler and Python's headers, both of which it uses while training runs."""
    command = [*shlex.split(compiler), "-x", "c++", "-fsyntax-only", "-I", headers, "-"]
    source = "#include <vector>\n#include <Python.h>\n"
    state: State = "PROBLEM" if needed else "note"
    try:
        done = subprocess.run(command, input=source, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.SubprocessError):
        fix = "install g++, or name a compiler in CXX" + ("; or train with --compile off" if needed else "")
        return Finding("C++ compiler", f"{compiler} does not run, so nothing can be compiled", state, fix)
    if done.returncode:
        reason = next((line for line in done.stderr.splitlines() if "error" in line), "").strip() or "it fails"
        fix = "install python3-dev (its headers), or unset CXX"
        return Finding("C++ compiler", f"{compiler} cannot compile for Python: {reason}", state, fix)
    return Finding("C++ compiler", f"{shutil.which(command[0]) or compiler}, with Python's headers")


def check_temporary_folder() -> Finding:
    """Whether the folder for temporary files holds what torch.compile writes to it."""
    fix = "export TMPDIR=<a folder with room>, or give --workdir to apptainer"
    try:
        folder = Path(tempfile.gettempdir())
    except FileNotFoundError:
        return Finding("temporary files", "there is no folder for them that you may write to", "PROBLEM", fix)
    return check_folder("temporary files", folder, fix, enough=TEMPORARY_BYTES)


def binds(mountinfo: str) -> list[str]:
    """What of the host a container can see: its mounts, but for those that make any container.

    Args:
        mountinfo: the text of /proc/self/mountinfo, see proc(5).
    """
    found = {}
    for line in mountinfo.splitlines():
        mount, _, system = line.partition(" - ")
        _, _, _, _, point, options, *_ = mount.split()
        # Blanks in a path are written as octal numbers.
        folder = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), point)
        if folder != "/" and not re.match(r"/(proc|sys|dev|etc|\.singularity\.d)(/|$)", folder):
            # Its kind tells what is the host's from the memory that a more isolated container gets in its place.
            found[folder] = f"{folder} ({'ro' if 'ro' in options.split(',') else 'rw'}, {system.split()[0]})"
    return list(found.values())


def _look_at_torch(environment: Mapping[str, str], in_container: bool) -> list[Finding]:
    import torch

    from nanochat.model.attention_choice import LADDER, is_installed
    from nanochat.runtime import cpu_has_fast_bfloat16, tf32_conflict

    listing = output_of("nvidia-smi", "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader")
    with warnings.catch_warnings(action="ignore"):
        sees = torch.cuda.device_count() if torch.cuda.is_available() else 0
    conflict = tf32_conflict()
    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU"
    compiler = environment.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    return [
        Finding("torch", f"{torch.__version__}, for {built_for}"),
        check_gpus(
            gpus_in(listing or ""),
            torch.version.cuda,
            sees,
            torch.cuda.get_arch_list() if sees else (),
            has_driver=Path("/proc/driver/nvidia/version").is_file(),
            in_container=in_container,
            hidden=environment.get("CUDA_VISIBLE_DEVICES") in ("", "-1"),
        ),
        check_cores(usable_cores(), os.cpu_count() or 1, environment.get("OMP_NUM_THREADS")),
        check_bfloat16(cpu_has_fast_bfloat16(), on_gpu=sees > 0),
        check_tf32(conflict, "" if conflict else torch.get_float32_matmul_precision()),
        check_attention({name: is_installed(rung.module) for name, rung in LADDER.items() if rung.module}, sees > 0),
        check_compiler(compiler, sysconfig.get_path("include"), needed=sees > 0),
    ]


def _look_at_expected(expect_gpus: int | None, expect_driver: str | None) -> Finding:
    listed = gpus_in(
        output_of("nvidia-smi", "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader") or ""
    )
    visible = 0
    if "torch" in sys.modules:
        import torch

        with warnings.catch_warnings(action="ignore"):
            visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return check_expected(expect_gpus, expect_driver, visible, listed)


def _numbers(version: str) -> tuple[int, ...]:
    """A version as numbers, to compare; nothing of what is none."""
    return tuple(map(int, re.findall(r"\d+", version)))


def _look_at_workspace(environment: Mapping[str, str]) -> list[Finding]:
    workspace, fix = Workspace.from_environment(), "export NANOCHAT_BASE_DIR=<a folder on scratch>"
    return [
        check_folder("NANOCHAT_BASE_DIR", workspace.root, fix, WORKSPACE_BYTES, WORKSPACE_BYTES_AT_EASE),
        *check_caches(environment, workspace),
    ]


def _importable(folder: Path) -> set[str]:
    """Names of what `import` would find in a folder."""
    if not folder.is_dir():
        return set()
    packages = {path.parent.name for path in folder.glob("*/__init__.py")}
    modules = {path.name.partition(".")[0] for path in folder.iterdir() if path.suffix in (".py", ".so")}
    return {name for name in packages | modules if name.isidentifier()}


def _counted(names: Sequence[str]) -> str:
    """`2 × NVIDIA H200`."""
    return ", ".join(f"{count} \N{MULTIPLICATION SIGN} {name}" for name, count in Counter(names).items())

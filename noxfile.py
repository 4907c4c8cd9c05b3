"""How the project is run, tested and checked. `pip install nox`, then `nox -s SESSION`; `nox -l` lists them."""

import os
import platform
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import nox

nox.needs_version = ">=2024.4.15"
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["test", "lint", "types"]

# PyTorch's own index of CPU builds. The default build for Linux brings several gigabytes of CUDA along.
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
TORCH = "torch==2.13.0"


def install(session: nox.Session, *extras: str, python: str = "python", checkout: str = ".") -> None:
    """Install this checkout with the frozen torch: the CPU build where there is no GPU.

    A folder of wheels named in PIP_FIND_LINKS is honoured: if it holds a CPU build, pip prefers that by itself.

    Args:
        session: whose environment it is.
        extras: of pyproject.toml, beside the frozen torch.
        python: of another environment than the session's.
        checkout: a copy of it elsewhere.
    """
    pip = (python, "-m", "pip", "install", "--quiet")
    foreign = python != "python"
    on_plain_linux = sys.platform == "linux" and platform.machine() == "x86_64"
    if on_plain_linux and not shutil.which("nvidia-smi") and not os.environ.get("PIP_FIND_LINKS"):
        # Where that index cannot be reached the next line installs the default build: larger, but it runs as well.
        session.run(*pip, TORCH, "--index-url", TORCH_CPU_INDEX, success_codes=[0, 1], external=foreign)
    package = ("--editable", f"{checkout}[{','.join(('frozen', *extras))}]")
    if foreign:
        session.run(*pip, *package, external=True)
    else:
        session.install(*package)


@nox.session
def demo(session: nox.Session) -> None:
    """Train a small chat model on built-in text, examine it, and ask it a question. No GPU, no download of data."""
    install(session)
    # After Ctrl-C the demo finishes its step and writes a checkpoint; nox would give it 0.3 seconds.
    session.run("nanochat", "demo", *session.posargs, interrupt_timeout=60.0, terminate_timeout=60.0)


@nox.session
def test(session: nox.Session) -> None:
    """Run the tests. Arguments after -- go to pytest."""
    install(session, "test")
    # A test file is one worker's, for its fixtures' sake; each worker computes on one core.
    session.run(
        *("pytest", "--numprocesses=auto", "--dist=loadfile", *session.posargs),
        env={"OMP_NUM_THREADS": "1", "WANDB_X_DISABLE_STATS": "true"},
    )


@nox.session
def other_torch(session: nox.Session) -> None:
    """Run the tests that rest on PyTorch with another release: `-- 2.11.0`, the oldest. What follows goes to pytest."""
    release, *arguments = session.posargs or ["2.11.0"]
    session.install("--editable", ".[test]", f"torch=={release}")
    folders = [f"tests/{room}" for room in ("model", "optim", "training", "chat", "evaluation", "export")]
    session.run(
        *("pytest", "--numprocesses=auto", "--dist=loadfile", *(arguments or folders)),
        env={"OMP_NUM_THREADS": "1", "WANDB_X_DISABLE_STATS": "true"},
    )


@nox.session
def endurance(session: nox.Session) -> None:
    """Kill the demo, and corpora in the making, at many moments; all must end as undisturbed ones. An hour or so."""
    install(session, "test")
    session.run("pytest", "-m", "endurance", "--capture=no", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting; `nox -s lint -- --fix` mends what can be mended."""
    session.install("ruff==0.17.6")
    fix = "--fix" in session.posargs
    session.run("ruff", "check", *(["--fix"] if fix else []), ".")
    session.run("ruff", "format", *([] if fix else ["--check"]), ".")


@nox.session
def types(session: nox.Session) -> None:
    """Check the types of the package, the benchmarks and this file."""
    install(session, "types")
    session.run("mypy")


@nox.session
def lock(session: nox.Session) -> None:
    """Pin what the image holds. `-- --check`: are they current? `-- --upgrade`: newer releases. `-- cu126`: another."""
    session.install("uv==0.13.9")
    work = Path(session.create_tmp())
    upgrade = ["--upgrade"] if "--upgrade" in session.posargs else []
    stale = []
    locked = {path.stem.removeprefix("requirements-") for path in Path("container").glob("requirements-*.lock")}
    for variant in sorted(locked | {name for name in session.posargs if not name.startswith("-")}):
        current, result = Path("container", f"requirements-{variant}.lock"), work / f"{variant}.lock"
        torch: list[str] = []
        # uv keeps the releases that the file it writes to names already, unless it is to upgrade.
        result.write_bytes(current.read_bytes() if current.exists() else b"")
        # PyPI has one build for CUDA; the others are in PyTorch's own indexes, or in a folder of wheels.
        if variant != "cuda":
            asked = work / f"{variant}.in"
            asked.write_text(f"{TORCH}+{variant}\n")
            links = os.environ.get("PIP_FIND_LINKS", "").split()
            # Those indexes also hold old releases of others' packages; this option takes torch alone from there.
            from_index = [] if links else [f"--torch-backend={variant}"]
            torch = [str(asked), *(f"--find-links={link}" for link in links), *from_index]
        session.run(
            *("uv", "pip", "compile", "--quiet", "pyproject.toml", "--generate-hashes", *torch),
            *("--extra=frozen", "--extra=azure", "--extra=tensorboard", "--extra=fast"),
            # Debian 12's Python and C library. No addresses, so that a lock is the same behind a mirror.
            *("--python-version=3.11", "--python-platform=x86_64-manylinux_2_36", "--only-binary=:all:", *upgrade),
            *("--no-emit-index-url", "--no-emit-find-links", "--no-annotate", "--no-header", f"--output-file={result}"),
        )
        if not current.exists() or result.read_bytes() != current.read_bytes():
            stale.append(str(current))
            if "--check" not in session.posargs:
                shutil.copy(result, current)
    if stale and "--check" in session.posargs:
        session.error(f"{', '.join(stale)} not as pyproject.toml asks; run: nox -s lock")
    session.log(f"written: {', '.join(stale)}" if stale else "current")


@nox.session
def image(session: nox.Session) -> None:
    """Build nanochat.sif and test it; options after -- go to container/build.py: `-- --variant cuda`, `-- --setup`."""
    # What is tested is in the image, so torch is not installed here, and the other tests' fixtures are left out.
    session.install("pytest>=8", "pytest-timeout>=2.3")
    options = list(session.posargs)
    if "--variant" not in options:
        options += ["--variant", "cuda" if shutil.which("nvidia-smi") else "cpu"]
    if "--output" not in options:
        options += ["--output", "nanochat.sif"]
    # A key that the build may see and the image may not hold; a test looks for it.
    canary = "canary-5b0d3e7a41"
    keys = dict.fromkeys(("WANDB_API_KEY", "HF_TOKEN", "APPTAINER_DOCKER_PASSWORD"), canary)
    session.run("python", "container/build.py", *options, env=keys)
    built = Path(options[options.index("--output") + 1]).resolve()
    session.run(
        *("pytest", "--noconftest", "-m", "image", "tests/container/test_container_image.py"),
        env={"NANOCHAT_IMAGE": str(built), "NANOCHAT_IMAGE_CANARY": canary},
    )


# Root's own folders, where checkouts and environments often lie, are closed to the users that jobs run as.
CLUSTER_FOLDER = Path("/var/cache/nanochat-cluster")


@nox.session(venv_backend="none")
def cluster(session: nox.Session) -> None:
    """Submit, stop, requeue and crash jobs on a Slurm cluster of four nodes on this machine; as root. `-- --setup`.

    Jobs run through the image that NANOCHAT_IMAGE names, or else with a Python environment, as NANOCHAT_TEST_USER.
    """
    if "--setup" in session.posargs:
        session.run("apt-get", "update", "--quiet", external=True)
        command = ("apt-get", "install", "--yes", "--quiet", "--no-install-recommends", "slurm-wlm", "munge")
        session.run(*command, env={"DEBIAN_FRONTEND": "noninteractive"}, external=True)
    if lacking := runpy.run_path("tests/slurm_cluster/local_slurm.py")["missing"]():
        session.error(lacking)
    user = os.environ.get("NANOCHAT_TEST_USER", "nanochat-test")
    if subprocess.run(["id", user], capture_output=True).returncode:
        session.run("useradd", "--create-home", "--shell=/bin/bash", user, external=True)
    checkout, environment = CLUSTER_FOLDER / "checkout", CLUSTER_FOLDER / "environment"
    shutil.rmtree(checkout, ignore_errors=True)
    for name in ("src", "slurm"):
        shutil.copytree(name, checkout / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(name, checkout)
    if not environment.exists():
        # The system's Python, as that of the session may be root's own.
        system = shutil.which("python3", path="/usr/local/bin:/usr/bin") or session.error("no python3 in /usr/bin")
        session.run(sys.executable, "-m", "virtualenv", f"--python={system}", str(environment), external=True)
    python = str(environment / "bin" / "python")
    install(session, "test", python=python, checkout=str(checkout))
    session.run(
        *(python, "-m", "pytest", "-m", "cluster", "tests/slurm_cluster"),
        *[argument for argument in session.posargs if argument != "--setup"],
        env={"NANOCHAT_TEST_USER": user, "NANOCHAT_TEST_CHECKOUT": str(checkout)},
        external=True,
    )

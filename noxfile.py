"""How the project is run, tested and checked. `pip install nox`, then `nox -s SESSION`; `nox -l` lists them."""

import os
import platform
import shutil
import sys

import nox

nox.needs_version = ">=2024.4.15"
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["test", "lint", "types"]

# PyTorch's own index of CPU builds. The default build for Linux brings several gigabytes of CUDA along.
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
TORCH = "torch==2.13.0"


def install(session: nox.Session, *extras: str) -> None:
    """Install this checkout with the frozen torch: the CPU build where there is no GPU.

    A folder of wheels named in PIP_FIND_LINKS is honoured: if it holds a CPU build, pip prefers that by itself.
    """
    on_plain_linux = sys.platform == "linux" and platform.machine() == "x86_64"
    if on_plain_linux and not shutil.which("nvidia-smi") and not os.environ.get("PIP_FIND_LINKS"):
        # Where that index cannot be reached the next line installs the default build: larger, but it runs as well.
        session.run(
            *("python", "-m", "pip", "install", "--quiet", TORCH, "--index-url", TORCH_CPU_INDEX),
            success_codes=[0, 1],
        )
    session.install("--editable", f".[{','.join(('frozen', *extras))}]")


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
def endurance(session: nox.Session) -> None:
    """Kill the demo at twenty random moments; it must end as an undisturbed one. Half an hour on two cores."""
    install(session, "test")
    session.run("pytest", "-m", "endurance", "--capture=no", "tests/endurance", *session.posargs)


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

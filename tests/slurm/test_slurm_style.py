"""The scripts are ones that bash, Slurm and the next reader take as they are meant."""

import re
import shutil
import sys
from pathlib import Path

import pytest
from slurm_scripts import PATH, SCRIPTS, SITES, SLURM, run

BATCH_SCRIPTS = [path for path in SCRIPTS if path.suffix == ".sbatch"]


def name(path: Path) -> str:
    return path.name


def tool(program: str) -> str:
    found = shutil.which(program, path=f"{Path(sys.executable).parent}:{PATH}")
    if found is None:
        pytest.skip(f"{program} is not installed: pip install {program}-py")
    return found


def test_shellcheck_finds_nothing() -> None:
    done = run(tool("shellcheck"), "--external-sources", *SCRIPTS)
    assert done.returncode == 0, done.stdout


def test_shfmt_changes_nothing() -> None:
    done = run(tool("shfmt"), "-i", "2", "-d", *SCRIPTS)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", [*SCRIPTS, *SITES], ids=name)
def test_lines_are_short_and_end_as_unix_has_it(path: Path) -> None:
    content = path.read_bytes()
    assert b"\r" not in content
    assert content.endswith(b"\n")
    assert max(map(len, content.decode().splitlines())) <= 120


@pytest.mark.parametrize("path", [SLURM / "submit", SLURM / "nanochat"], ids=name)
def test_what_a_person_types_can_be_executed(path: Path) -> None:
    assert path.stat().st_mode & 0o111
    assert path.read_text().startswith("#!/bin/bash\n")


@pytest.mark.parametrize("path", BATCH_SCRIPTS, ids=name)
def test_slurm_reads_every_directive(path: Path) -> None:
    # After the first command a directive is ignored in silence, and a variable in one is not replaced.
    lines = path.read_text().splitlines()
    first_command = next(n for n, line in enumerate(lines) if line and not line.startswith("#"))
    directives = [n for n, line in enumerate(lines) if re.match(r"#\s*SBATCH", line)]
    assert directives
    assert max(directives) < first_command
    assert all(lines[n].startswith("#SBATCH --") and "$" not in lines[n] for n in directives)


@pytest.mark.parametrize("path", BATCH_SCRIPTS, ids=name)
def test_a_requeued_job_goes_on_with_its_log(path: Path) -> None:
    assert "\n#SBATCH --open-mode=append\n" in path.read_text()


@pytest.mark.parametrize("path", BATCH_SCRIPTS, ids=name)
def test_no_script_names_a_secret(path: Path) -> None:
    assert not re.search(r"API_KEY|TOKEN", path.read_text())

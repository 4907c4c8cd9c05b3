"""The scripts in slurm/, run by a real bash, on a machine that has no Slurm or is treated as if it had none."""

import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path

SLURM = Path(__file__).parents[2] / "slurm"
SCRIPTS = sorted(path for path in SLURM.iterdir() if path.is_file())
SITES = sorted(SLURM.glob("sites/*.env"))
PATH = "/usr/local/bin:/usr/bin:/bin"


def run(
    *words: str | Path, cwd: Path = SLURM, env: Mapping[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run a command in a bare environment, to which `env` adds."""
    bare = {"PATH": PATH, "HOME": str(cwd), "USER": "me", "LC_ALL": "C.UTF-8"}
    return subprocess.run(
        list(map(str, words)),
        cwd=cwd,
        env={**bare, **(env or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def call(script: str, code: str, *, cwd: Path = SLURM, env: Mapping[str, str] | None = None) -> str:
    """What bash prints that has sourced a script of slurm/ and then runs some code; both succeed."""
    beginning = f"set -euo pipefail; JOB_SCRIPTS={shlex.quote(str(SLURM))}; source {shlex.quote(str(SLURM / script))}; "
    done = run("bash", "-c", beginning + code, cwd=cwd, env=env)
    assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def path_without_slurm(folder: Path) -> str:
    """A PATH on which are this machine's programs, but for Slurm's."""
    folder.mkdir()
    for program in [*Path("/bin").iterdir(), *Path("/usr/bin").iterdir()]:
        if not program.name.startswith(("sbatch", "sinfo", "squeue", "sacct", "scontrol", "scancel", "srun")):
            (folder / program.name).unlink(missing_ok=True)
            (folder / program.name).symlink_to(program)
    return str(folder)


def write_site(folder: Path, **values: str | Path) -> Path:
    """A site file for folders below this one."""
    settings: dict[str, str | Path] = {"SITE_PARTITION": "gpu", "SITE_SCRATCH": folder / "scratch", **values}
    file = folder / "site.env"
    file.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
    return file

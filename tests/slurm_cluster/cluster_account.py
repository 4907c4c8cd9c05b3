"""What a person has on a cluster: a checkout, a scratch folder and a site file; and what jobs leave there."""

import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from local_slurm import SlurmCluster

CHECKOUT = Path(os.environ.get("NANOCHAT_TEST_CHECKOUT", "."))
IMAGE = os.environ.get("NANOCHAT_IMAGE", "")
# Where there is no image jobs run in the environment that the tests run in.
ENVIRONMENT = Path(sys.prefix)
JOB_ID = re.compile(r"^job +(\d+)", re.MULTILINE)


@dataclass(frozen=True)
class Account:
    """One user's folders.

    Attributes:
        cluster: where jobs are submitted.
        folder: holds `nanochat`, the checkout, and `scratch`, and is the user's with all that is in it.
    """

    cluster: SlurmCluster
    folder: Path

    @property
    def checkout(self) -> Path:
        return self.folder / "nanochat"

    @property
    def scratch(self) -> Path:
        return self.folder / "scratch"

    @property
    def workspace(self) -> Path:
        return self.scratch / "nanochat"

    def write(self, path: Path, content: str) -> None:
        """Write a file that is the user's."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode())
        for made in (path, path.parent):
            shutil.chown(made, self.cluster.user, self.cluster.user)

    def write_site(self, **changes: str | int | Path) -> None:
        """Write the site file: one that works, with some values changed."""
        values: dict[str, str | int | Path] = {
            "SITE_PARTITION": "cpu",
            "SITE_SCRATCH": self.scratch,
            **({"SITE_IMAGE": IMAGE} if IMAGE else {"SITE_VENV": ENVIRONMENT}),
            **changes,
        }
        lines = [f"{name}={shlex.quote(str(value))}\n" for name, value in values.items()]
        self.write(self.checkout / "slurm/sites/test.env", "".join(lines))

    def try_to_submit(self, *arguments: str | Path, **env: str) -> "subprocess.CompletedProcess[str]":
        """Run slurm/submit, whatever comes of it; `env` adds to the environment of a fresh login."""
        # One thread for each rank, as they share few cores, and as the bits of a result depend on how many there are.
        login = {"NANOCHAT_SITE": "test", "OMP_NUM_THREADS": "1"}
        return self.cluster.run("slurm/submit", *arguments, cwd=self.checkout, env={**login, **env})

    def submit(self, *arguments: str | Path, **env: str) -> str:
        """Submit a job and return its id."""
        done = self.try_to_submit(*arguments, **env)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        found = JOB_ID.search(done.stdout)
        assert found, done.stdout
        return found[1]

    # What a job does and leaves.

    def log(self, job: str) -> str:
        """What a job has written so far."""
        path = Path(self.cluster.job(job).get("StdOut", "-"))
        return path.read_text(errors="replace") if path.is_file() else ""

    def finish(self, job: str, *, seconds: float = 120) -> None:
        """Wait until a job is COMPLETED."""
        try:
            self.cluster.wait_for_state(job, "COMPLETED", seconds=seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n--- log of job {job}\n{self.log(job)[-6000:]}") from None

    def wait_for_log(self, job: str, pattern: str, *, seconds: float = 90) -> None:
        """Wait until a job has written something that matches."""
        written = re.compile(pattern)
        try:
            self.cluster.wait_until(lambda: written.search(self.log(job)), f"log has {pattern!r}", seconds=seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n--- log of job {job}\n{self.log(job)[-6000:]}") from None

    def ranks(self, job: str) -> list[int]:
        """The process ids of a job's trainers."""
        mine = f"SLURM_JOB_ID={job}\0".encode()
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                in_python = "python" in (folder / "exe").readlink().name
                if in_python and b"nanochat" in (folder / "cmdline").read_bytes():
                    found += [int(folder.name)] if mine in (folder / "environ").read_bytes() else []
        return found

    def pause(self, job: str) -> list[int]:
        """Stop the clock of a job's trainers; returns what `os.kill(…, SIGCONT)` is for."""
        ranks = self.ranks(job)
        assert ranks, f"no trainer of job {job} runs\n{self.log(job)[-3000:]}"
        for rank in ranks:
            os.kill(rank, signal.SIGSTOP)
        return ranks

    def checkpoints(self, stage: str = "base") -> list[int]:
        """The steps of which there is a checkpoint."""
        folders = self.workspace.glob(f"{stage}_checkpoints/*/step_*/manifest.json")
        return sorted(int(path.parent.name.removeprefix("step_")) for path in folders)

    def weights(self, step: int, stage: str = "base") -> str:
        """The digest of the weights of a checkpoint."""
        (path,) = self.workspace.glob(f"{stage}_checkpoints/*/step_{step:06d}/model.safetensors")
        return hashlib.sha256(path.read_bytes()).hexdigest()

    def losses(self, run: str, stage: str = "base") -> list[float]:
        """The training loss of each step."""
        (path,) = self.workspace.glob(f"runs/{run}/{stage}/*/metrics.jsonl")
        rows = map(json.loads, path.read_text().splitlines())
        return [row[key] for row in rows for key in row if key.endswith("/loss")]


@contextmanager
def fresh_account(cluster: SlurmCluster) -> Iterator[Account]:
    """An account, and at its end no job of anybody's."""
    with tempfile.TemporaryDirectory(prefix="nanochat-account-", ignore_cleanup_errors=True) as folder:
        account = Account(cluster, Path(folder))
        shutil.copytree(CHECKOUT / "slurm", account.checkout / "slurm")
        account.scratch.mkdir()
        account.write_site()
        for path in (account.folder, *account.folder.rglob("*")):
            shutil.chown(path, cluster.user, cluster.user)
        account.folder.chmod(0o755)
        yield account
        cluster.cancel_all()

"""What Slurm says of one's jobs, asked with its own commands; nothing where they are not.

They are not inside a container. So `slurm/nanochat` asks before it enters one, and hands the answer in.
"""

import os
import re
import shutil
from dataclasses import dataclass

from nanochat.identity import output_of

# The name last, as it may hold anything.
FORMAT = "%i|%T|%L|%r|%j"
FIELDS = FORMAT.count("|") + 1


@dataclass(frozen=True)
class Job:
    """A job in the queue.

    Attributes:
        job_id: as squeue shows it: 12, or 12_3 of an array.
        state: PENDING, RUNNING, COMPLETING and so on.
        time_left: until its limit.
        reason: why it waits.
        name: slurm/submit calls a job as its run.
    """

    job_id: str
    state: str
    time_left: str
    reason: str
    name: str


def my_jobs() -> list[Job] | None:
    """One's jobs that wait or run, or None if Slurm cannot be asked."""
    if (handed_in := os.environ.get("NANOCHAT_SQUEUE")) is not None:
        return jobs_in(handed_in)
    if shutil.which("squeue") is None:
        return None
    listing = output_of("squeue", "--me", "--noheader", "--array", f"--format={FORMAT}")
    return None if listing is None else jobs_in(listing)


def jobs_in(listing: str) -> list[Job]:
    """The jobs in squeue's lines; what is no such line is left out."""
    rows = [line.strip().split("|", FIELDS - 1) for line in listing.splitlines()]
    return [Job(*row) for row in rows if len(row) == FIELDS]


def job_log(job_id: str) -> str | None:
    """The path of a job's output, of jobs that Slurm still knows."""
    if shutil.which("scontrol") is None:
        return None
    return log_in(output_of("scontrol", "show", "job", job_id) or "")


def log_in(description: str) -> str | None:
    """The path of the output in what scontrol shows, where each line may hold several keys, but this one is alone."""
    found = re.search(r"^\s*StdOut=(.+)$", description, re.MULTILINE)
    return found[1].strip() if found else None

"""Whether a run is really moving: its heartbeat, held against the processes of this host and the jobs of Slurm.

A job that Slurm calls running may hang, and one that ended may have left a heartbeat that still says "running". So the
heartbeat says what was done last and when, and Slurm or the host whether somebody is left to go on.
"""

import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from nanochat.checkpoint.folders import KIND
from nanochat.cluster.slurm import Job, job_log, my_jobs
from nanochat.errors import DataError, UsageError
from nanochat.files import read_json, read_manifest, verify_files
from nanochat.tracking.console import format_count, format_seconds
from nanochat.training.heartbeat import ENDED, FILE_NAME
from nanochat.workspace import Workspace, check_run_name

# Of a process that beats in another host's file system, and of a clock that is not quite this one's.
SAME_START_SECONDS = 2.0


@dataclass(frozen=True)
class Status:
    """How a run stands: one word, what more there is to say, and its last heartbeat."""

    run: str
    state: str
    detail: str
    heartbeat: Mapping[str, Any]
    job: Job | None


def run_status(workspace: Workspace, run: str, jobs: Sequence[Job] | None, now: float | None = None) -> Status:
    """How one run stands.

    Args:
        jobs: one's jobs, None if Slurm cannot be asked.
        now: seconds since 1970.

    Raises:
        UsageError: there is no such run.
    """
    folder = workspace.run(run)
    job = next((job for job in jobs or () if job.name == run), None)
    if not folder.is_dir() and job is None:
        known = ", ".join(run_names(workspace)) or "none"
        raise UsageError(f"there is no run {run!r} in {workspace.root} (there are: {known})", "see: nanochat status")
    heartbeat = read_heartbeat(folder / FILE_NAME)
    beating_job = next((job for job in jobs or () if job.job_id == heartbeat.get("job")), None)
    job = beating_job or job
    age = (time.time() if now is None else now) - heartbeat.get("time", 0.0)
    state, detail = judge(heartbeat, age, job, is_alive(heartbeat, jobs))
    return Status(run, state, detail, heartbeat, job)


def judge(heartbeat: Mapping[str, Any], age: float, job: Job | None, alive: bool | None) -> tuple[str, str]:
    """The state of a run in one word, and why.

    Args:
        heartbeat: its last, empty if there is none.
        age: seconds since then.
        job: its job, if it waits or runs.
        alive: whether the process that beat is still there; None if nobody can tell.
    """
    if job is not None and job.state == "PENDING":
        return "queued", f"job {job.job_id} waits: {job.reason}"
    if not heartbeat:
        return ("starting", f"job {job.job_id} runs, no heartbeat yet") if job else ("unknown", "it has no heartbeat")
    ago = f"{format_seconds(max(0.0, age))} ago"
    if heartbeat["state"] in ENDED:
        return heartbeat["state"], f"{ago}{f': {message}' if (message := heartbeat.get('message')) else ''}"
    if alive is False:
        return "dead", f"last heard {ago}; its process has gone, the same command carries on"
    silence = heartbeat.get("silence")
    if silence is not None and age > silence:
        unsure = "" if alive else ", or its process has gone"
        return "STALLED", f"for {format_seconds(age)}{unsure}"
    return heartbeat["state"], f"last heard {ago}"


def is_alive(heartbeat: Mapping[str, Any], jobs: Sequence[Job] | None) -> bool | None:
    """Whether the process that beat is still there; None if it cannot be known from this host."""
    if not heartbeat or heartbeat["state"] in ENDED:
        return None
    if heartbeat.get("job") and jobs is not None:
        return any(job.job_id == heartbeat["job"] and job.state != "PENDING" for job in jobs)
    if heartbeat["host"] != socket.gethostname():
        return None
    try:
        started = psutil.Process(heartbeat["pid"]).create_time()
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return None
    return bool(abs(started - heartbeat["process_started"]) < SAME_START_SECONDS)


def read_heartbeat(path: Path) -> dict[str, Any]:
    """A heartbeat, or nothing if there is none that can be read: it is a hint, not data."""
    try:
        content = read_json(path)
    except (DataError, OSError):
        return {}
    needed = {"state", "time", "stage", "host", "pid", "process_started"}
    return content if isinstance(content, dict) and needed <= content.keys() else {}


def run_names(workspace: Workspace) -> list[str]:
    """The runs of a workspace, those that were heard of last at the end."""
    folder = workspace.root / "runs"
    found = [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    return [
        path.name for path in sorted(found, key=lambda path: (read_heartbeat(path / FILE_NAME).get("time", 0), path))
    ]


def checkpoint_text(path: str | None) -> str:
    """The last checkpoint, and whether it is there, whole in size."""
    if not path:
        return "none in this stage since it was started"
    folder = Path(path)
    try:
        verify_files(folder, read_manifest(folder, KIND, "")["files"], "", checksums=False)
    except DataError as error:
        return f"{path}, but {error.what}"
    return path


def show_run(workspace: Workspace, run: str) -> str:
    """What is known of one run, a line for each.

    Raises:
        UsageError: there is no such run.
    """
    status = run_status(workspace, check_run_name(run), my_jobs())
    beat = status.heartbeat
    job_id = status.job.job_id if status.job else beat.get("job")
    lines = {"run": run, "state": f"{status.state}, {status.detail}", "stage": beat.get("stage")}
    if "step" in beat:
        lines["step"] = f"{beat['step']} of {beat['num_steps']}"
    if "tokens_per_second" in beat:
        lines["loss"] = f"{float(beat['loss']):.4f}"
        lines["speed"] = f"{format_count(round(beat['tokens_per_second']))} tokens/s"
        lines["left"] = f"{format_seconds(beat['seconds_left'])} of steps"
        lines["checkpoint"] = checkpoint_text(beat.get("checkpoint"))
    lines["done"] = ", ".join(finished_stages(workspace, run)) or None
    if job_id:
        limit = f", {status.job.time_left} until its limit" if status.job and status.job.state == "RUNNING" else ""
        lines["job"] = f"{job_id}{limit}"
        lines["log"] = beat.get("log") or job_log(job_id)
    if beat:
        lines["process"] = f"{beat['pid']} on {beat['host']}"
    return "\n".join(f"{name:<12}{value}" for name, value in lines.items() if value)


def show_runs(workspace: Workspace) -> str:
    """A line for each run of the workspace."""
    jobs = my_jobs()
    names = run_names(workspace)
    rows = [("RUN", "STATE", "STAGE", "STEP", "LEFT", "")]
    for name in names:
        status = run_status(workspace, name, jobs)
        beat = status.heartbeat
        step = f"{beat['step']}/{beat['num_steps']}" if "step" in beat else ""
        left = format_seconds(beat["seconds_left"]) if "seconds_left" in beat and status.state not in ENDED else ""
        rows.append((name, status.state, beat.get("stage", ""), step, left, status.detail))
    widths = [max(len(row[column]) for row in rows) + 2 for column in range(5)]
    table = [("".join(f"{cell:<{width}}" for cell, width in zip(row, [*widths, 0]))).rstrip() for row in rows]
    return "\n".join(table) if names else f"there is no run in {workspace.root} yet"


def finished_stages(workspace: Workspace, run: str) -> list[str]:
    """The stages of a run that have a record, in the order in which they ended."""
    records = list((workspace.run(run) / "stages").glob("*.json"))
    return [path.stem for path in sorted(records, key=lambda path: path.stat().st_mtime)]

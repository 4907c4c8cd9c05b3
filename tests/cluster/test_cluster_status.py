"""`nanochat status` tells a run that moves from one that only looks so."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.cluster.slurm import Job, jobs_in, log_in, my_jobs
from nanochat.cluster.status import judge, run_names, run_status, show_run, show_runs
from nanochat.errors import UsageError
from nanochat.files import file_entry, write_manifest
from nanochat.training.heartbeat import beating
from nanochat.workspace import Workspace

NOW = 1_000_000.0
RUNNING = Job("12", "RUNNING", "3:00:00", "None", "run")
PENDING = Job("12", "PENDING", "4:00:00", "Resources", "run")


def write_heartbeat(workspace: Workspace, run: str = "run", **fields: Any) -> Path:
    """A heartbeat of this very process, which takes steps, with other values where given."""
    path = workspace.run(run) / "heartbeat.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    beat = {
        "state": "running",
        "silence": 120.0,
        "stage": "base",
        "step": 300,
        "num_steps": 1000,
        "loss": 3.25,
        "tokens_per_second": 1.25e6,
        "seconds_left": 700.0,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process_started": psutil.Process().create_time(),
        "job": None,
        "log": None,
        "time": NOW,
    }
    path.write_text(json.dumps({**beat, **fields}))
    return path


@pytest.mark.parametrize(
    ("fields", "jobs", "seconds", "state", "said"),
    [
        ({}, None, 10, "running", "10.0 s ago"),
        ({}, None, 121, "STALLED", "for 2 min 01 s"),
        ({"state": "saving", "silence": 3600.0}, None, 121, "saving", "2 min 01 s ago"),
        ({"state": "running", "silence": None, "stage": "tokenizer"}, None, 9999, "running", "2 h 46 min ago"),
        # Its process has gone: this number is another's now.
        ({"process_started": 1.0}, None, 10, "dead", "the same command carries on"),
        ({"pid": 2**22 + 1}, None, 10, "dead", "its process has gone"),
        # Another host's process, of which nothing can be seen from here.
        ({"host": "node7"}, None, 10, "running", "10.0 s ago"),
        ({"host": "node7"}, None, 600, "STALLED", "or its process has gone"),
        # What Slurm says outweighs what this host says.
        ({"job": "12", "host": "node7"}, [RUNNING], 10, "running", "10.0 s ago"),
        ({"job": "12", "host": "node7"}, [RUNNING], 600, "STALLED", "for 10 min 00 s"),
        ({"job": "12", "host": "node7"}, [], 10, "dead", "its process has gone"),
        ({"job": "12", "state": "stopped", "message": "at 3"}, [PENDING], 10, "queued", "job 12 waits: Resources"),
        ({"state": "stopped", "message": "stopped by SIGTERM"}, None, 10, "stopped", "stopped by SIGTERM"),
        ({"state": "finished"}, [], 10**6, "finished", "11 d 13 h ago"),
        ({"state": "failed", "message": "base diverged"}, None, 10, "failed", "base diverged"),
    ],
)
def test_the_state_is_what_heartbeat_process_and_job_say_together(
    fields: dict[str, Any], jobs: list[Job] | None, seconds: float, state: str, said: str, tmp_path: Path
) -> None:
    workspace = Workspace(tmp_path)
    write_heartbeat(workspace, **fields)
    status = run_status(workspace, "run", jobs, NOW + seconds)
    assert (status.state, said in status.detail) == (state, True), status.detail


def test_a_job_that_has_not_begun_is_found_by_the_name_of_its_run(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    assert run_status(workspace, "run", [PENDING]).state == "queued"
    assert run_status(workspace, "run", [RUNNING]).state == "starting"
    with pytest.raises(UsageError, match=r"no run 'other'.*nanochat status"):
        run_status(workspace, "other", [PENDING])


@given(
    st.sampled_from(["starting", "running", "evaluating", "saving", "stopped", "finished", "failed"]),
    st.none() | st.floats(1, 10_000),
    st.floats(-100, 10**7),
    st.sampled_from([None, RUNNING, PENDING]),
    st.sampled_from([None, True, False]),
)
def test_a_run_is_never_called_moving_after_its_time(
    state: str, silence: float | None, age: float, job: Job | None, alive: bool | None
) -> None:
    said, detail = judge({"state": state, "silence": silence}, age, job, alive)
    assert detail
    if said in ("starting", "running", "evaluating", "saving"):
        assert alive is not False
        assert silence is None or age <= silence
    if said == "queued":
        assert job == PENDING


@pytest.mark.parametrize("content", ["", "[]", "{", '{"state": "running"}'])
def test_a_heartbeat_that_cannot_be_read_is_as_none(content: str, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    write_heartbeat(workspace).write_text(content)
    assert run_status(workspace, "run", None).state == "unknown"
    assert "unknown" in show_runs(workspace)


def test_one_run_is_shown_in_full_with_a_checkpoint_that_is_really_there(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    folder = workspace.checkpoints("base", "d12") / "step_000300"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text("weights")
    write_manifest(folder, "checkpoint", [file_entry(folder / "model.safetensors")], step=300)
    write_heartbeat(workspace, time=time.time(), checkpoint=str(folder), log="/logs/train-12.log", job="12")
    (workspace.run("run") / "stages").mkdir()
    for stage in ("corpus", "tokenizer"):
        (workspace.run("run") / "stages" / f"{stage}.json").write_text("{}")
    shown = show_run(workspace, "run")
    for line in (
        "state       running",
        "step        300 of 1000",
        "loss        3.2500",
        "speed       1.25 M tokens/s",
        "left        11 min 40 s",
        f"checkpoint  {folder}",
        "done        corpus, tokenizer",
        "log         /logs/train-12.log",
        "job         12",
    ):
        assert line in shown
    (folder / "model.safetensors").unlink()
    assert f"{folder / 'model.safetensors'} is missing" in show_run(workspace, "run")


def test_without_a_name_there_is_a_line_for_each_run_the_latest_at_the_end(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    assert "no run" in show_runs(workspace)
    write_heartbeat(workspace, "first", time=1.0)
    write_heartbeat(workspace, "last", time=time.time())
    write_heartbeat(workspace, "between", time=2.0, state="finished")
    assert run_names(workspace) == ["first", "between", "last"]
    lines = show_runs(workspace).splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [
        ["first", "STALLED"],
        ["between", "finished"],
        ["last", "running"],
    ]


def test_a_run_that_was_killed_is_dead_and_one_that_ended_is_finished(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    script = (
        "import sys, time; from pathlib import Path; from nanochat.training.heartbeat import beating\n"
        "with beating(Path(sys.argv[1]), 'base') as heartbeat:\n"
        "    heartbeat.beat('running', step=1, num_steps=9); print('beat', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(workspace.run("run"))], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    assert run_status(workspace, "run", None).state == "running"
    process.kill()
    process.communicate()
    assert run_status(workspace, "run", None).state == "dead"
    with beating(workspace.run("run"), "base"):
        pass
    assert run_status(workspace, "run", None).state == "finished"


def test_the_command_needs_no_torch_and_names_the_runs_there_are(
    run_command: Callable[..., "subprocess.CompletedProcess[str]"], tmp_path: Path
) -> None:
    write_heartbeat(Workspace(tmp_path), "mine")
    result = run_command("status", "yours", workspace=tmp_path)
    assert (result.returncode, "(there are: mine)" in result.stderr) == (2, True), result.stderr
    assert run_command("status", "mine", workspace=tmp_path).returncode == 0
    code = "import nanochat.cluster.status, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_jobs_are_read_from_squeue_whatever_their_names_hold() -> None:
    listing = "12|RUNNING|2:59:01|None|run\n13_4|PENDING|UNLIMITED|Resources|a | b\nslurm_load_jobs error\n"
    assert jobs_in(listing) == [
        Job("12", "RUNNING", "2:59:01", "None", "run"),
        Job("13_4", "PENDING", "UNLIMITED", "Resources", "a | b"),
    ]


def test_inside_an_image_the_jobs_are_those_that_were_handed_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert my_jobs() is None
    monkeypatch.setenv("NANOCHAT_SQUEUE", "12|PENDING|1:00|Priority|run\n")
    assert my_jobs() == [Job("12", "PENDING", "1:00", "Priority", "run")]
    monkeypatch.setenv("NANOCHAT_SQUEUE", "")
    assert my_jobs() == []


def test_the_log_is_read_from_scontrol_with_the_blanks_in_its_path() -> None:
    shown = "JobId=12 JobName=run\n   StdErr=/my logs/12.err\n   StdOut=/my logs/12.log\n   Power=\n"
    assert log_in(shown) == "/my logs/12.log"
    assert log_in("slurm_load_jobs error: Invalid job id specified") is None

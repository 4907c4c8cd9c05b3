import dataclasses
import os
import socket
import time
from pathlib import Path

import pytest
from wandb_runs import python
from wandb_server import KEY, WandbServer, wandb_server

from nanochat.errors import NanochatError, UsageError
from nanochat.tracking.metrics import MetricsLog
from nanochat.tracking.runs import RunRecord, begin_record, mark_of, stage_folders, summarise
from nanochat.tracking.sync import Server, find_sources, sync
from nanochat.tracking.wandb_run import name_run
from nanochat.workspace import Workspace

STAGE = "runs/arm_a/base/tiny"

# What training does, without a model: metrics, W&B and the record, from a checkpoint on, to an end or a kill.
TRAIN = """
from nanochat.tracking import runs
from nanochat.tracking.console import Console
from nanochat.tracking.metrics import MetricsLog

def train(first, last, killed=False):
    folder = Path(FOLDER) / "runs/arm_a/base/tiny"
    names = name_run("arm_a", "base", tags=["tiny"])
    record = runs.begin_record(folder, names, run="arm_a", stage="base", model_tag="tiny", num_steps=20,
                               config={"depth": 4})
    metrics = MetricsLog(folder / "metrics.jsonl")
    with metrics as log, runs.track_run(record, folder, Path(FOLDER), "offline") as tracked:
        log.resume(first)
        for step in range(first + 1, last + 1):
            log.log(step, {"batch/loss": 1 / step})
            tracked.wandb.log({"batch/loss": 1 / step}, step)
            Console().info(f"step {step}")
        if killed:
            (file,) = tracked.wandb.folder.glob("*.wandb")
            while file.stat().st_size < 2000:
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGKILL)
        tracked.wandb.table("epoch/samples", [{"prompt": "a", "text": "b"}], last)
        tracked.final = {"final/bpb": 1.5}
"""

LOSSES = [(step, 1 / step) for step in range(1, 21)]


def train(folder: Path, calls: str) -> None:
    quick = {"WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL": "0.2"}
    code = TRAIN + calls
    done = python(folder, code, environment=quick)
    assert done.returncode in (0, -9), done.stderr


def points(server: WandbServer) -> list[tuple[int, float]]:
    return [(row["_step"], row["batch/loss"]) for row in server.runs["nanochat", "arm_a-base"].history]


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch):
    """Make a server the one that is synced to."""

    def point(server_url: str) -> Server:
        for name in list(os.environ):
            if name.startswith("WANDB_"):
                monkeypatch.delenv(name)
        monkeypatch.setenv("WANDB_BASE_URL", server_url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        return Server.from_environment()

    return point


def run_sync(folder: Path, server: Server | None, *names: str, **how: float) -> list[tuple[str, str]]:
    sources = find_sources(Workspace(folder), names)
    given = {"quiet_seconds": 0.0, "arrive_seconds": 10.0, **how}
    return [(out.state, out.text) for out in sync(sources, server=server, report=lambda outcome: None, **given)]


def test_a_run_that_was_killed_and_resumed_arrives_as_if_nothing_had_happened_and_once(tmp_path, at):
    train(tmp_path, "train(0, 9, killed=True)")
    with wandb_server() as server:
        # A login node's sync may come between two jobs.
        assert run_sync(tmp_path, at(server.url)) == [("sent", "9 rows sent, 9 are there")]
        train(tmp_path, "train(7, 20)")
        assert summarise(tmp_path / STAGE, Workspace(tmp_path)).synced is False
        assert run_sync(tmp_path, at(server.url)) == [("sent", "11 rows sent, 20 are there")]
        run = server.runs["nanochat", "arm_a-base"]
        assert points(server) == LOSSES
        assert [line for line in run.console.splitlines() if "step 20" in line]
        assert (run.exit_code, run.config["depth"]["value"]) == (0, 4)
        assert (run.fields["groupName"], run.fields["jobType"], run.fields["tags"]) == ("arm_a", "base", ["tiny"])
        assert [name for name in run.files if name.startswith("media/html/")]
        assert '"final/bpb":1.5' in run.stream("wandb-summary.json")[-1]
        lines = len(run.console.splitlines())

        assert run_sync(tmp_path, at(server.url)) == [("there", "nothing new since it was synced")]
        for mark in tmp_path.rglob("*.synced"):
            mark.unlink()
        assert run_sync(tmp_path, at(server.url)) == [("there", "0 rows sent, 20 are there")]
        assert points(server) == LOSSES
        assert len(run.console.splitlines()) == lines
    assert summarise(tmp_path / STAGE, Workspace(tmp_path)).synced is True


def test_rows_that_never_reached_a_segment_arrive_from_metrics_jsonl(tmp_path, at):
    train(tmp_path, "train(0, 4)")
    with MetricsLog(tmp_path / STAGE / "metrics.jsonl") as log:
        for step, value in LOSSES[4:]:
            log.log(step, {"batch/loss": value})
    with wandb_server() as server:
        assert run_sync(tmp_path, at(server.url), "arm_a") == [("sent", "20 rows sent, 20 are there")]
        assert points(server) == LOSSES


def test_plain_folders_of_wandb_are_put_together_too(tmp_path, at):
    script = """
        import wandb
        for first, last in ((0, 9), (7, 20)):
            run = wandb.init(mode="offline", dir=FOLDER, id="theirs", project="p")
            for step in range(first + 1, last + 1):
                run.log({"step": step, "batch/loss": 1 / step})
            run.finish()
    """
    quiet = {"WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true"}
    assert python(tmp_path, script, environment=quiet).returncode == 0
    with wandb_server() as server:
        assert run_sync(tmp_path, at(server.url), str(tmp_path / "wandb")) == [("sent", "20 rows sent, 20 are there")]
        assert [(row["_step"], row["batch/loss"]) for row in server.runs["p", "theirs"].history] == LOSSES


def test_a_server_that_takes_no_rows_is_a_failure_whatever_wandb_sync_says(tmp_path, at):
    train(tmp_path, "train(0, 20)")
    with wandb_server() as server:
        server.refuse = {"file_stream": 403}
        ((state, _),) = run_sync(tmp_path, at(server.url), arrive_seconds=0.5)
        assert state == "failed"
        assert not list(tmp_path.rglob("*.synced"))
        server.refuse = {}
        assert run_sync(tmp_path, at(server.url)) == [("sent", "20 rows sent, 20 are there")]
        assert points(server) == LOSSES


def test_a_server_that_loses_rows_without_a_word_is_found_out(tmp_path, at, monkeypatch):
    train(tmp_path, "train(0, 20)")
    with wandb_server() as server:
        monkeypatch.setattr("wandb_server.Run.resume_status", lambda run: None)
        ((state, text),) = run_sync(tmp_path, at(server.url), arrive_seconds=0.5)
    assert state == "failed"
    assert "0 rows up to step -1 are there, 20 up to step 20 should be" in text


def test_a_refused_key_and_a_silent_host_are_one_line_within_seconds(tmp_path, at, monkeypatch):
    train(tmp_path, "train(0, 3)")
    monkeypatch.setattr("nanochat.tracking.sync.REQUEST_SECONDS", 0.5)
    with wandb_server() as server:
        server.refuse = {"RunResumeStatus": 401}
        assert "does not accept the key — wandb login" in run_sync(tmp_path, at(server.url))[0][1]
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert "does not answer (timed out) — run it where there is internet" in run_sync(tmp_path, at(url))[0][1]
    assert "does not answer" in run_sync(tmp_path, at("http://127.0.0.1:9"))[0][1]


def test_what_is_being_written_is_left_alone_and_a_dry_run_sends_nothing(tmp_path, at):
    train(tmp_path, "train(0, 9, killed=True)")
    with wandb_server() as server:
        assert run_sync(tmp_path, at(server.url), quiet_seconds=600) == [("skipped", "still being written")]
        assert run_sync(tmp_path, None)[0][0] == "would send"
        assert server.runs == {}
    old = time.time() - 700
    for path in tmp_path.rglob("*"):
        os.utime(path, (old, old))
    assert run_sync(tmp_path, None, quiet_seconds=600)[0][0] == "would send"
    assert summarise(tmp_path / STAGE, Workspace(tmp_path)).state == "lost"


def test_a_run_without_wandb_is_not_sent_and_a_name_of_nothing_is_refused(tmp_path):
    folder = tmp_path / "runs/quiet/base/tiny"
    names = name_run("quiet", "base")
    record = begin_record(folder, names, run="quiet", stage="base", model_tag="tiny", num_steps=2, config={})
    record.write(folder)
    assert run_sync(tmp_path, None) == [("skipped", "W&B was disabled")]
    for name in ("nothing", str(tmp_path)):
        with pytest.raises(UsageError, match="neither a tracked run nor a folder"):
            find_sources(Workspace(tmp_path), (name,))


def test_without_a_key_there_is_one_line_that_says_where_to_put_it(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "NANOCHAT_BASE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NanochatError, match=r"no W&B key — wandb login, or put WANDB_API_KEY=… into \.env"):
        Server.from_environment()


def test_a_run_of_which_only_the_record_is_left_is_sent_from_it(tmp_path, at):
    folder = tmp_path / STAGE
    names = name_run("arm_a", "base")
    record = begin_record(folder, names, run="arm_a", stage="base", model_tag="tiny", num_steps=20, config={"depth": 4})
    dataclasses.replace(record, state="failed", wandb_folder=str(tmp_path / "gone")).write(folder)
    with MetricsLog(folder / "metrics.jsonl") as log:
        for step, value in LOSSES:
            log.log(step, {"batch/loss": value})
    assert [RunRecord.read(path).run for path in stage_folders(Workspace(tmp_path))] == ["arm_a"]
    with wandb_server() as server:
        assert run_sync(tmp_path, at(server.url)) == [("sent", "20 rows sent, 20 are there")]
        assert points(server) == LOSSES
        assert server.runs["nanochat", "arm_a-base"].config["depth"]["value"] == 4


def test_marks_are_those_that_wandb_sync_looks_for(tmp_path):
    assert mark_of(tmp_path / "run-a.wandb").name == "run-a.wandb.synced"

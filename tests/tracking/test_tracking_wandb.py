import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

import nanochat
from nanochat.errors import UsageError
from nanochat.tracking.wandb_run import run_id_for, start_wandb

STRACE = shutil.which("strace")
SOURCE = Path(nanochat.__file__).parents[1]

START = """
import os, signal, sys, time
from pathlib import Path
from nanochat.tracking.wandb_run import start_wandb

def start(**changes):
    config = {"depth": 4, "optimizer": {"lr": 0.02}}
    given = {"run_name": "arm_a", "stage": "base", "config": config, "folder": Path(FOLDER)}
    return start_wandb(**{**given, **changes})
"""


def python(folder, script, *, under=(), environment=None, **how):
    """Run a script in a new process with no W&B variables but the ones given."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    kept |= {"WANDB_X_DISABLE_STATS": "true", "PYTHONPATH": str(SOURCE)} | (environment or {})
    code = f"FOLDER = {str(folder)!r}{START}{textwrap.dedent(script)}"
    return subprocess.run(
        [*under, sys.executable, "-c", code], env=kept, capture_output=True, text=True, timeout=120, **how
    )


def run_folders(folder):
    return sorted((folder / "wandb").glob("offline-run-*"))


def read_back(run_folder):
    """Every record of an offline run, by type, as W&B's own reader prints them."""
    done = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(run_folder)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "WANDB_ERROR_REPORTING": "false"},
    )
    records = {}
    for record in map(json.loads, done.stdout.splitlines()):
        records.setdefault(record["type"], []).append(record[record["type"]])
    return records


def history(records):
    return [
        {key: value for key, value in row["item"].items() if key in ("step", "_step") or "/" in key}
        for row in records.get("history", [])
    ]


def test_a_run_that_ends_well_can_be_read_back_whole(tmp_path):
    done = python(
        tmp_path,
        """
        run = start()
        assert run.folder.is_dir()
        for step in (0, 10, 20):
            run.log({"batch/loss": 1 / (step + 1)}, step)
        run.log({"epoch/val_bpb": 1.5}, 20)
        print("a line for the console")
        run.summary({"final/val_bpb": 1.5})
        run.finish(3)
        run.log({"batch/loss": 0.0}, 30)
        """,
    )
    assert (done.returncode, done.stderr) == (0, "")
    (folder,) = run_folders(tmp_path)
    records = read_back(folder)
    (run,) = records["run"]
    assert run["config"]["update"] | {"_wandb": 0} == {"depth": 4, "optimizer": {"lr": 0.02}, "_wandb": 0}
    assert (run["project"], run["run_id"], run["display_name"]) == ("nanochat", "arm_a-base", "arm_a-base")
    assert (run["run_group"], run["job_type"]) == ("arm_a", "base")
    assert history(records) == [
        {"step": 0, "_step": 0, "batch/loss": 1.0},
        {"step": 10, "_step": 10, "batch/loss": pytest.approx(1 / 11)},
        {"step": 20, "_step": 20, "batch/loss": pytest.approx(1 / 21), "epoch/val_bpb": 1.5},
    ]
    assert {"final/val_bpb": 1.5} in [record["update"] for record in records["summary"]]
    assert any(metric.get("step_metric") == "step" for metric in records["metric"])
    assert "a line for the console" in "".join(record["line"] for record in records["output_raw"])
    assert [record["exit_code"] for record in records["exit"]] == [3]


def test_a_killed_run_keeps_its_rows_and_a_restart_is_the_same_run(tmp_path):
    script = """
        run = start()
        (file,) = run.folder.glob("*.wandb")
        step = 0
        while file.stat().st_size < 20_000:
            run.log({"batch/loss": 1.0, "text": "x" * 1000}, step)
            step += 1
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = python(tmp_path, script, environment={"WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL": "0.2"})
    assert done.returncode == -signal.SIGKILL
    python(tmp_path, "run = start(); run.log({'batch/loss': 0.5}, 3); run.finish()")

    killed, restarted = map(read_back, run_folders(tmp_path))
    steps = [row["step"] for row in history(killed)]
    assert steps == list(range(len(steps)))
    assert len(steps) >= 5
    assert "exit" not in killed
    assert history(restarted) == [{"step": 3, "_step": 3, "batch/loss": 0.5}]
    assert killed["run"][0]["run_id"] == restarted["run"][0]["run_id"]


def test_a_folder_that_cannot_be_written_is_reported_with_its_fix_and_training_goes_on(tmp_path):
    (tmp_path / "file").touch()
    script = """
        run = start()
        run.log({"batch/loss": 1.0}, 0)
        run.summary({"x": 1})
        run.finish(0)
        print("trained", run.active, run.folder)
    """
    done = python(tmp_path / "file" / "below", script, environment={"TMPDIR": str(tmp_path)})
    assert (done.returncode, done.stdout) == (0, "trained False None\n")
    assert re.fullmatch(
        r"warning: W&B is off: its folder cannot be written .*below.* — export WANDB_DIR=.*\n", done.stderr
    )
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_failure_while_training_is_reported_once_and_training_goes_on(tmp_path):
    # Killing W&B's own process is what a node short of memory does.
    script = """
        import psutil
        run = start()
        for child in psutil.Process().children():
            child.kill()
            child.wait()
        for step in range(300):
            run.log({"batch/loss": 1.0}, step)
            time.sleep(0.001)
        run.summary({"x": 1})
        run.finish(0)
        print("trained", run.active)
    """
    done = python(tmp_path, script)
    assert (done.returncode, done.stdout) == (0, "trained False\n")
    assert re.fullmatch(r"warning: W&B stopped recording \(.*\) — metrics.jsonl .*\n", done.stderr)


def test_several_stages_of_one_process_are_several_runs(tmp_path):
    script = """
        for stage in ("base", "mid"):
            run = start(stage=stage)
            run.log({"batch/loss": 1.0}, 0)
            run.finish()
    """
    assert python(tmp_path, script).stderr == ""
    runs = [read_back(folder) for folder in run_folders(tmp_path)]
    assert sorted(run["run"][0]["run_id"] for run in runs) == ["arm_a-base", "arm_a-mid"]
    assert all(len(history(run)) == 1 and run["exit"] for run in runs)


def test_online_without_a_key_asks_nothing_and_records_offline(tmp_path):
    # A terminal on stdin and stderr is where W&B would ask for a key.
    script = """
        import pty
        ours, theirs = pty.openpty()
        stderr = os.dup(2)
        os.dup2(theirs, 0)
        os.dup2(theirs, 2)
        sys.stdin = open(0, closefd=False)
        run = start(mode="online")
        os.dup2(stderr, 2)
        run.log({"batch/loss": 1.0}, 0)
        run.finish()
        assert sys.stdin.isatty()
        print(os.read(ours, 10_000).decode())
    """
    home = tmp_path / "home"
    home.mkdir()
    unreachable = {"WANDB_BASE_URL": "http://127.0.0.1:9", "HOME": str(home)}
    done = python(tmp_path, script, environment=unreachable)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("warning: W&B cannot go online") == 1
    assert "No API key" in done.stdout
    (folder,) = run_folders(tmp_path)
    assert len(history(read_back(folder))) == 1


@pytest.mark.skipif(STRACE is None, reason="strace is not installed")
def test_offline_opens_no_connection_to_another_machine(tmp_path):
    trace = tmp_path / "trace"
    under = (str(STRACE), "-f", "-qq", "-e", "trace=connect,sendto", "-o", str(trace))
    done = python(tmp_path, "run = start(); run.log({'batch/loss': 1.0}, 0); run.finish()", under=under)
    if "ptrace" in done.stderr.lower():
        pytest.skip("this machine does not allow tracing")
    assert done.returncode == 0, done.stderr
    calls = trace.read_text()
    assert "AF_UNIX" in calls, "the trace saw nothing at all"
    addresses = [line for line in calls.splitlines() if "AF_INET" in line]
    assert [line for line in addresses if "127.0.0.1" not in line and '"::1"' not in line] == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_it_runs_as_a_user_without_name_or_home():
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        folder.chmod(0o777)
        how = {"user": 54321, "group": 54321, "extra_groups": [], "cwd": folder}
        try:
            subprocess.run([sys.executable, "-c", f"open({nanochat.__file__!r})"], check=True, **how)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("another user can run neither this Python nor this source tree")
        script = """
            del os.environ["HOME"]
            run = start(folder=Path(FOLDER) / "mine")
            run.log({"batch/loss": 1.0}, 0)
            run.finish()
        """
        done = python(folder, script, **how)
        assert (done.returncode, done.stderr) == (0, "")
        (run_folder,) = run_folders(folder / "mine")
        assert len(history(read_back(run_folder))) == 1


def test_a_users_own_folder_and_project_win(tmp_path):
    theirs = tmp_path / "theirs"
    script = "start().finish()"
    done = python(tmp_path, script, environment={"WANDB_DIR": str(theirs), "WANDB_PROJECT": "mine"})
    assert done.stderr == ""
    (folder,) = run_folders(theirs)
    assert read_back(folder)["run"][0]["project"] == "mine"
    assert not (tmp_path / "wandb").exists()


def test_disabled_writes_nothing_and_imports_nothing(tmp_path):
    script = """
        run = start()
        run.log({"batch/loss": 1.0}, 0)
        run.finish()
        print("wandb" in sys.modules)
    """
    done = python(tmp_path, script, environment={"WANDB_MODE": "disabled"})
    assert (done.stdout, done.stderr) == ("False\n", "")
    assert list(tmp_path.iterdir()) == []


def test_a_mode_that_does_not_exist_is_refused_with_its_fix(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "ofline")
    with pytest.raises(UsageError, match="export WANDB_MODE=offline"):
        start_wandb(run_name="a", stage="base", config={}, folder=tmp_path)


def test_run_ids_are_stable_distinct_and_short_enough_for_a_file_name():
    long = "r" * 128
    names = ("a", "b", long, long[:-1] + "s")
    ids = [run_id_for(name, stage) for name in names for stage in ("base", "mid")]
    assert len(set(ids)) == len(ids)
    assert ids == [run_id_for(name, stage) for name in names for stage in ("base", "mid")]
    assert max(map(len, ids)) <= 96

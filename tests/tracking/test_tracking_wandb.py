import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from wandb_runs import console, history, python, read_back, run_folders
from wandb_server import KEY, wandb_server

import nanochat
from nanochat.errors import UsageError
from nanochat.tracking.wandb_run import choose_mode, name_run, run_id_for

STRACE = shutil.which("strace")


@pytest.fixture
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """No W&B variable, no job, no key anywhere."""
    for name in list(os.environ):
        if name.startswith(("WANDB_", "SLURM_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "no.netrc"))
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "workspace"))
    monkeypatch.chdir(tmp_path)
    return monkeypatch


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
    assert (run["project"], run["run_id"]) == ("nanochat", "arm_a-base")
    assert re.fullmatch(r"v\d+\.\d+-arm_a-base_\d{8}-\d{6}", run["display_name"])
    assert (run["run_group"], run["job_type"]) == ("arm_a", "base")
    assert history(records) == [
        {"step": 0, "_step": 0, "batch/loss": 1.0},
        {"step": 10, "_step": 10, "batch/loss": pytest.approx(1 / 11)},
        {"step": 20, "_step": 20, "batch/loss": pytest.approx(1 / 21), "epoch/val_bpb": 1.5},
    ]
    assert {"final/val_bpb": 1.5} in [record["update"] for record in records["summary"]]
    assert any(metric.get("step_metric") == "step" for metric in records["metric"])
    assert "a line for the console" in console(records)
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
    assert "there is no key" in done.stdout
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


def test_a_mode_that_does_not_exist_is_refused_with_its_fix(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "ofline")
    with pytest.raises(UsageError, match="export WANDB_MODE=offline"):
        choose_mode("auto")


def test_run_ids_are_stable_distinct_and_short_enough_for_a_file_name():
    long = "r" * 128
    names = ("a", "b", long, long[:-1] + "s")
    ids = [run_id_for(name, stage) for name in names for stage in ("base", "mid")]
    assert len(set(ids)) == len(ids)
    assert ids == [run_id_for(name, stage) for name in names for stage in ("base", "mid")]
    assert max(map(len, ids)) <= 96


def test_names_say_version_run_stage_and_job_and_what_a_user_sets_wins(bare_environment):
    bare_environment.setenv("SLURM_JOB_ID", "4711")
    names = name_run("exp-top16-d26", "base", tags=["d26"])
    assert re.fullmatch(r"v\d+\.\d+-exp-top16-d26-base_4711", names.name)
    assert (names.group, names.job_type, names.project, names.tags) == ("exp-top16-d26", "base", "nanochat", ("d26",))
    for name, value in {"NAME": "mine", "RUN_GROUP": "ours", "PROJECT": "theirs", "TAGS": "a,b"}.items():
        bare_environment.setenv(f"WANDB_{name}", value)
    names = name_run("exp-top16-d26", "base", tags=["d26"])
    assert (names.name, names.group, names.project, names.tags) == ("mine", "ours", "theirs", ("d26", "a", "b"))
    assert name_run("a", "base", project="flag", group="flag").group == "flag"
    assert name_run("a", "base", project="flag").project == "flag"


def test_without_a_word_it_is_online_only_with_a_key_and_an_answer(bare_environment, capsys):
    with wandb_server() as server:
        bare_environment.setenv("WANDB_BASE_URL", server.url)
        assert choose_mode("auto") == "offline"
        bare_environment.setenv("WANDB_API_KEY", KEY)
        assert choose_mode("auto") == "online"
        bare_environment.setenv("WANDB_MODE", "offline")
        assert choose_mode("auto") == "offline"
        assert choose_mode("online") == "online"
        bare_environment.delenv("WANDB_MODE")
    assert choose_mode("auto") == "offline"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("asked", ["auto", "online"])
def test_a_host_that_never_answers_costs_seconds_and_not_the_run(bare_environment, capsys, asked):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        bare_environment.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        bare_environment.setenv("WANDB_API_KEY", KEY)
        assert choose_mode(asked) == "offline"
    assert ("does not answer" in capsys.readouterr().err) == (asked == "online")


def test_a_wrong_key_is_named_with_its_fix_never_shown_and_the_run_is_recorded(tmp_path):
    script = "run = start(); run.log({'batch/loss': 1.0}, 0); run.finish()"
    with wandb_server() as server:
        address = {"WANDB_BASE_URL": server.url, "WANDB_MODE": "online"}
        short = python(tmp_path, script, environment={**address, "WANDB_API_KEY": KEY[:30]})
        server.refuse = {"UpsertBucket": 401, "Viewer": 401, "ServerFeaturesQuery": 401}
        refused = python(tmp_path, script, environment={**address, "WANDB_API_KEY": KEY[:-1] + "x"})
    assert "has 30 characters, a key has 40 or more" in short.stderr
    assert "W&B cannot go online" in refused.stderr
    for done in (short, refused):
        assert done.returncode == 0
        assert KEY[:30] not in done.stdout + done.stderr
    assert [len(history(read_back(folder))) for folder in run_folders(tmp_path)] == [1, 1]
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert KEY[:30].encode() not in written


def test_online_a_resumed_run_goes_on_and_no_step_is_there_twice(tmp_path):
    script = """
        run = start()
        for step in range({first}, {last}):
            run.log({{"batch/loss": float(step)}}, step)
        run.finish()
    """
    with wandb_server() as server:
        online = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}
        for first, last in ((0, 10), (7, 12)):
            done = python(tmp_path, script.format(first=first, last=last), environment=online)
            assert (done.returncode, done.stderr) == (0, "")
        run = server.runs["nanochat", "arm_a-base"]
    assert [(row["_step"], row["batch/loss"]) for row in run.history] == [(step, step) for step in range(12)]


def test_what_was_printed_before_the_run_and_what_ended_it_are_in_its_logs(tmp_path):
    script = """
        from nanochat.tracking.console import Console
        console = Console()
        console.info("before the run")
        run = start()
        console.info("while it runs")
        with console.progress("tokenising", 2) as bar:
            bar.advance(2)
        run.note("UsageError: what ended it")
        run.finish()
        console.info("between the runs")
        run = start(stage="mid")
        run.finish()
    """
    done = python(tmp_path, script)
    assert done.stderr == ""
    base, mid = sorted(run_folders(tmp_path), key=lambda folder: folder.name[-3:])
    logs = {folder.name[-3:]: console(read_back(folder)) for folder in (base, mid)}
    lines = logs["ase"].splitlines()
    assert lines[:2] == ["before the run", "while it runs"]
    assert re.fullmatch(r"tokenising: 100 % 2/2 .*", lines[2])
    assert lines[3] == "UsageError: what ended it"
    assert logs["mid"] == "between the runs\n"
    assert done.stdout.splitlines() == [*lines[:3], "between the runs"]


def test_a_table_is_shown_with_its_text_as_it_is(tmp_path):
    script = """
        run = start()
        run.table("epoch/samples", [{"prompt": "a < b", "text": "<script>"}, {"prompt": "c", "text": "d"}], 3)
        run.finish()
    """
    assert python(tmp_path, script).stderr == ""
    (folder,) = run_folders(tmp_path)
    (row,) = read_back(folder)["history"]
    page = (folder / "files" / row["item"]["epoch/samples.path"]).read_text()
    assert page.count("<tr>") == 3
    assert "a &lt; b" in page
    assert "<script>" not in page


def test_what_an_interrupted_job_logged_is_read_back_after_sigterm(tmp_path):
    script = """
        run = start()
        for step in range(20):
            run.log({"batch/loss": 1.0}, step)
        try:
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            run.finish(75)
    """
    assert python(tmp_path, script).returncode == 75
    (folder,) = run_folders(tmp_path)
    records = read_back(folder)
    assert len(history(records)) == 20
    assert [record["exit_code"] for record in records["exit"]] == [75]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_full_disk_costs_tracking_and_not_the_run(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "none", str(small)], capture_output=True).returncode:
        pytest.skip("this machine does not allow mounts")
    try:
        script = """
            run = start(folder=Path(FOLDER) / "small")
            for step in range(2000):
                run.log({"batch/loss": 1.0, "text": "x" * 1000}, step)
            run.finish()
            print("trained")
        """
        done = python(tmp_path, script, environment={"WANDB_FINISH_TIMEOUT": "10"})
    finally:
        subprocess.run(["umount", str(small)], check=True)
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["trained"])

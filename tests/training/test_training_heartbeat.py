"""A heartbeat says where a run is and how it ended, costs next to nothing, and never costs the run."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from nanochat.errors import DataError, StoppedForRequeueError, StopSignal
from nanochat.training.heartbeat import FILE_NAME, Heartbeat, beating, tell


def read(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / FILE_NAME).read_text())
    return content


def test_a_step_is_written_now_and_then_and_a_new_state_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = 0.0
    monkeypatch.setattr("time.monotonic", lambda: clock)
    with beating(tmp_path, "base") as heartbeat:
        heartbeat.beat("running", step=1)
        assert read(tmp_path)["step"] == 1
        for step in range(2, 100):
            clock += 0.04
            heartbeat.beat("running", step=step)
        assert read(tmp_path)["step"] == 1
        clock += 5
        heartbeat.beat("running", step=100, loss=float("nan"))
        assert (read(tmp_path)["step"], read(tmp_path)["loss"]) == (100, "NaN")
        heartbeat.beat("saving")
        assert read(tmp_path)["state"] == "saving"
    assert read(tmp_path)["state"] == "finished"
    assert read(tmp_path)["pid"] == os.getpid()
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


@pytest.mark.parametrize(
    ("error", "state", "message"),
    [
        (StoppedForRequeueError("base stopped at step 3", "again"), "stopped", "base stopped at step 3 — again"),
        (StopSignal("SIGUSR1"), "stopped", "stopped by SIGUSR1"),
        (KeyboardInterrupt(), "stopped", "stopped by Ctrl-C"),
        (DataError("broken", "mend it"), "failed", "broken — mend it"),
        (ValueError("odd"), "failed", "ValueError: odd"),
    ],
)
def test_the_end_of_a_run_is_told_with_its_reason(
    error: BaseException, state: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(type(error)), beating(tmp_path, "base"):
        raise error
    assert (read(tmp_path)["state"], read(tmp_path)["message"]) == (state, message)


def test_a_stage_of_a_run_beats_for_the_run_and_does_not_end_it(tmp_path: Path) -> None:
    with beating(tmp_path, "tokenize"):
        tell(state="running", step=3, num_steps=5)
        assert read(tmp_path)["step"] == 3
        with beating(tmp_path, "base") as inner:
            assert (read(tmp_path)["stage"], "step" in read(tmp_path)) == ("base", False)
            inner.beat("running")
        assert read(tmp_path)["state"] == "running"
    assert read(tmp_path)["state"] == "finished"
    tell(state="running")
    assert read(tmp_path)["state"] == "finished"


def test_a_run_that_takes_steps_is_stalled_sooner_than_its_watchdog_ends_it(tmp_path: Path) -> None:
    with beating(tmp_path, "base") as heartbeat:
        assert read(tmp_path)["silence"] is None
        heartbeat.on_beat = lambda state: 3600.0 if state == "saving" else 900.0
        for state, step_seconds, silence in [
            ("evaluating", 1.0, 900.0),
            ("running", 1.0, 120.0),
            ("saving", 1.0, 3600.0),
            ("running", 30.0, 300.0),
            ("evaluating", 30.0, 900.0),
            ("running", 300.0, 900.0),
        ]:
            heartbeat.beat(state, step_seconds=step_seconds)  # type: ignore[arg-type]  # a State, in a table.
            assert read(tmp_path)["silence"] == silence


def test_a_place_that_cannot_be_written_costs_the_heartbeat_and_not_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with beating(tmp_path / "file" / "run", "base") as heartbeat:
        heartbeat.beat("running", step=1)
    full = tmp_path / "run"
    full.mkdir()
    (full / FILE_NAME).mkdir()
    with beating(full, "base") as heartbeat:
        heartbeat.beat("running", step=1)
    assert [path.name for path in full.iterdir()] == [FILE_NAME]


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    heartbeat = Heartbeat(None, "base")
    heartbeat.beat("running", step=1)
    assert list(tmp_path.iterdir()) == []
    assert heartbeat.doing == "base, running at step 1"


def test_the_job_is_named_as_squeue_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    expected: list[tuple[dict[str, str], str | None]] = [
        ({}, None),
        ({"SLURM_JOB_ID": "12"}, "12"),
        ({"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3", "SLURM_JOB_ID": "15"}, "12_3"),
    ]
    for variables, job in expected:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with beating(tmp_path, "base"):
            assert read(tmp_path)["job"] == job

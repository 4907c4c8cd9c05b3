import pytest

from nanochat.errors import DataError, StoppedForRequeueError, StopSignal, UsageError
from nanochat.tracking.listing import table_of_runs
from nanochat.tracking.metrics import MetricsLog
from nanochat.tracking.runs import RunRecord, begin_record, find_stage, track_run
from nanochat.tracking.wandb_run import name_run
from nanochat.workspace import Workspace


def begin(workspace, run="arm_a", stage="base", model_tag="d2"):
    folder = workspace.run(run) / stage / model_tag
    names = name_run(run, stage)
    record = begin_record(folder, names, run=run, stage=stage, model_tag=model_tag, num_steps=20, config={"depth": 2})
    return folder, record


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path)


def test_a_record_is_read_as_it_was_written_and_a_restart_keeps_name_and_start(workspace, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    folder, record = begin(workspace)
    record.write(folder)
    assert RunRecord.read(folder) == record
    monkeypatch.setenv("SLURM_JOB_ID", "2")
    _, again = begin(workspace)
    assert (again.names.name, again.started) == (record.names.name, record.started)
    assert again.names.name.endswith("_1")


@pytest.mark.parametrize(
    ("error", "state", "code"),
    [
        (None, "finished", 0),
        (StoppedForRequeueError("stopped"), "stopped", 75),
        (StopSignal("SIGUSR1"), "stopped", 75),
        (DataError("damaged"), "failed", 4),
        (ZeroDivisionError(), "failed", 1),
    ],
)
def test_a_record_says_how_its_run_ended(workspace, error, state, code):
    folder, record = begin(workspace)
    try:
        with track_run(record, folder, workspace.wandb, "disabled") as tracked:
            assert RunRecord.read(folder).state == "running"
            if error is not None:
                raise error
            tracked.final = {"final/bpb": 1.5}
    except type(error):
        pass
    ended = RunRecord.read(folder)
    assert (ended.state, ended.exit_code) == (state, code)
    assert ended.final == ({"final/bpb": 1.5} if error is None else {})


def test_the_table_of_runs_says_where_each_stands(workspace):
    assert "there are no runs" in table_of_runs(workspace)
    folder, record = begin(workspace)
    record.write(folder)
    with MetricsLog(folder / "metrics.jsonl") as log:
        log.log(5, {"batch/loss": 3.0, "batch/smoothed_loss": 3.25})
        log.log(10, {"epoch/bpb": 1.5})
    damaged, _ = begin(workspace, run="arm_b")
    damaged.mkdir(parents=True)
    (damaged / "run.json").write_text("{}")
    _, first, second = table_of_runs(workspace).splitlines()
    assert first.split()[:7] == ["arm_a", "base", "d2", "running", "10/20", "3.2500", "1.5000"]
    assert second.startswith("arm_b")
    assert "is not the record of a run" in second
    assert "arm_b" not in table_of_runs(workspace, "arm_a")
    with pytest.raises(UsageError, match="no tracked run 'arm_c'"):
        table_of_runs(workspace, "arm_c")


def test_a_stage_is_found_by_as_much_of_its_name_as_tells_it(workspace):
    for stage, tag in (("base", "d2"), ("mid", "d2"), ("sft", "d2"), ("sft", "d4")):
        folder, record = begin(workspace, stage=stage, model_tag=tag)
        record.write(folder)
    assert find_stage(workspace, "arm_a").parts[-2:] == ("base", "d2")
    assert find_stage(workspace, "arm_a/mid").parts[-2:] == ("mid", "d2")
    assert find_stage(workspace, "arm_a/sft/d4").parts[-2:] == ("sft", "d4")
    with pytest.raises(UsageError, match="name one of: arm_a/sft/d2 arm_a/sft/d4"):
        find_stage(workspace, "arm_a/sft")
    with pytest.raises(UsageError, match="there is no tracked run 'other'"):
        find_stage(workspace, "other")


def test_the_arms_of_an_experiment_are_listed_and_found_too(workspace):
    arm = Workspace(workspace.root / "experiments/mix/top16")
    folder, record = begin(arm, run="mix-top16-d2-s42")
    record.write(folder)
    assert "mix-top16-d2-s42" in table_of_runs(workspace)
    assert find_stage(workspace, "mix-top16-d2-s42") == folder


def test_a_record_that_cannot_be_written_does_not_cost_the_run(workspace):
    folder, record = begin(workspace)
    folder.parent.mkdir(parents=True)
    folder.touch()
    with track_run(record, folder, workspace.wandb, "disabled") as tracked:
        tracked.final = {"final/bpb": 1.5}
    assert folder.is_file()

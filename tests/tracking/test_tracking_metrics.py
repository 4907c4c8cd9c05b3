import json
import math
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.errors import DataError
from nanochat.tracking import metrics
from nanochat.tracking.metrics import MetricsLog

keys = st.text(min_size=1).filter(lambda key: key != "step")
values = st.one_of(st.integers(), st.floats(), st.text().filter(lambda text: text not in metrics.NON_FINITE))


def same(left: object, right: object) -> bool:
    both_nan = isinstance(left, float) and isinstance(right, float) and math.isnan(left) and math.isnan(right)
    return both_nan or (type(left) is type(right) and left == right)


@settings(max_examples=50, deadline=None)
@given(rows=st.lists(st.tuples(st.integers(), st.dictionaries(keys, values)), max_size=8))
def test_what_is_logged_is_what_is_read_whatever_the_values(rows):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.jsonl"
        with MetricsLog(path) as log:
            for step, row in rows:
                log.log(step, row)
        found = metrics.read(path)
    assert [row.pop("step") for row in found] == [step for step, _ in rows]
    for (_, logged), read in zip(rows, found, strict=True):
        assert logged.keys() == read.keys()
        assert all(same(logged[key], read[key]) for key in logged)


def test_a_diverged_loss_is_still_valid_json(tmp_path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.log(1, {"loss": math.nan, "norm": math.inf, "low": -math.inf})
    row = json.loads(path.read_text(), parse_constant=refuse)
    assert row == {"step": 1, "loss": "NaN", "norm": "Infinity", "low": "-Infinity"}


def test_a_row_is_in_the_file_before_log_returns(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in range(3):
        log.log(step, {"loss": 1.0})
        assert len(metrics.read(log.path)) == step + 1
    log.close()


def test_series_gives_the_points_of_one_metric(tmp_path):
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        log.log(0, {"loss": 3.0})
        log.log(0, {"epoch/bpb": 1.5})
        log.log(1, {"loss": 2.0})
    rows = metrics.read(log.path)
    assert metrics.series(rows, "loss") == ([0, 1], [3.0, 2.0])
    assert metrics.series(rows, "epoch/bpb") == ([0], [1.5])
    assert metrics.series(rows, "absent") == ([], [])


def test_a_row_cannot_hide_its_own_step(tmp_path):
    with MetricsLog(tmp_path / "metrics.jsonl") as log, pytest.raises(ValueError, match="step"):
        log.log(1, {"step": 2})


def test_a_killed_run_loses_no_row_and_a_resumed_one_has_each_step_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    script = """
        import itertools, sys
        from pathlib import Path
        from nanochat.tracking.metrics import MetricsLog
        log = MetricsLog(Path(sys.argv[1]))
        for step in itertools.count():
            log.log(step, {"loss": 1 / (step + 1), "text": "x" * 300})
            print(step, flush=True)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= 50:
            break
    process.send_signal(signal.SIGKILL)
    said = [int(line) for line in process.stdout.read().split()]
    process.wait()

    steps = [row["step"] for row in metrics.read(path)]
    assert steps == list(range(len(steps)))
    assert len(steps) > max(said, default=50)

    with MetricsLog(path) as log:
        log.resume(30)
        for step in range(31, 40):
            log.log(step, {"loss": 0.0})
    assert [row["step"] for row in metrics.read(path)] == list(range(40))


def test_a_torn_last_line_is_dropped_and_the_next_row_is_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "loss": 2.0}\n{"step": 1, "lo')
    assert [row["step"] for row in metrics.read(path)] == [0]
    with MetricsLog(path) as log:
        log.log(1, {"loss": 1.0})
    assert metrics.read(path) == [{"step": 0, "loss": 2.0}, {"step": 1, "loss": 1.0}]


def test_resuming_at_the_last_step_leaves_the_file_alone(tmp_path):
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        log.log(1, {"loss": 1.0})
        before = log.path.stat()
        log.resume(1)
        assert log.path.stat().st_ino == before.st_ino


def test_a_damaged_row_is_named_with_the_command_that_removes_it(tmp_path):
    path = tmp_path / "a folder" / "metrics.jsonl"
    path.parent.mkdir()
    path.write_text('{"step": 0}\nrubbish\n{"step": 2}\n')
    with pytest.raises(DataError, match="line 2 is damaged") as caught:
        metrics.read(path)
    assert caught.value.fix is not None
    subprocess.run(caught.value.fix.removeprefix("delete that line: "), shell=True, check=True)
    assert [row["step"] for row in metrics.read(path)] == [0, 2]


def test_a_missing_log_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="missing"):
        metrics.read(tmp_path / "metrics.jsonl")


def test_a_full_disk_is_an_error_and_leaves_only_whole_rows(tmp_path):
    # A file size limit stops a write in its middle, as a full disk or a quota does.
    path = tmp_path / "metrics.jsonl"
    script = """
        import resource, sys
        from pathlib import Path
        from nanochat.tracking.metrics import MetricsLog
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        log = MetricsLog(Path(sys.argv[1]))
        log.log(0, {"text": "x" * 40})
        try:
            log.log(1, {"text": "x" * 40})
        except OSError as error:
            print(error.strerror)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        log.log(2, {"text": "there is room again"})
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "File too large"
    assert [row["step"] for row in metrics.read(path)] == [0, 2]

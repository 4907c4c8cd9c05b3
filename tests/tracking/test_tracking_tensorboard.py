import pytest

from nanochat.tracking.metrics import MetricsLog
from nanochat.tracking.tensorboard import EventFiles


def test_event_files_hold_what_metrics_jsonl_holds_each_step_once(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = tmp_path / "tensorboard"
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        for first, last in ((0, 5), (3, 8)):
            with EventFiles(folder, log.path, first) as events:
                log.resume(first)
                for step in range(first + 1, last + 1):
                    log.log(step, {"batch/loss": 1 / step, "text": "left out"})
                    events.log(step, {"batch/loss": 1 / step, "text": "left out"})
    found = accumulator.EventAccumulator(str(folder)).Reload()
    assert found.Tags()["scalars"] == ["batch/loss"]
    assert [(event.step, event.value) for event in found.Scalars("batch/loss")] == [
        (step, pytest.approx(1 / step)) for step in range(1, 9)
    ]

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.errors import DataError
from nanochat.tracking.merge import Source, merge
from nanochat.tracking.metrics import MetricsLog
from nanochat.tracking.transaction_log import record_types, write_log


def loss(step):
    return 1 / (step + 1)


def segment(folder, number, steps, *, explicit=True, lines=(), own_steps=None):
    """A segment as one start of a run leaves it."""
    kinds = record_types()
    records = [kinds.Record(run={"run_id": "a-base", "project": "p", "start_time": {"seconds": 1000 + number}})]
    for place, step in enumerate(steps):
        row = {"batch/loss": loss(step), "_runtime": place, "_timestamp": 1000 + number + place}
        row |= {"step": step} if explicit else {}
        items = [kinds.HistoryItem(nested_key=[key], value_json=json.dumps(value)) for key, value in row.items()]
        at = own_steps[place] if own_steps else step
        records.append(kinds.Record(history=kinds.HistoryRecord(item=items, step={"num": at})))
    records += [kinds.Record(output_raw={"line": line}) for line in lines]
    path = folder / f"offline-run-2026010{number}_000000-a-base" / "run-a-base.wandb"
    path.parent.mkdir(parents=True)
    write_log(path, records)
    return path


def losses(merged):
    return {step: json.loads(row[("batch/loss",)]) for step, row in merged.rows.items()}


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_however_often_a_run_was_killed_its_rows_are_those_of_an_undisturbed_one(data):
    with tempfile.TemporaryDirectory() as place:
        folder, num_steps, checkpoint, paths = Path(place), 40, 0, []
        with MetricsLog(folder / "metrics.jsonl") as log:
            for number in range(data.draw(st.integers(1, 5))):
                reached = data.draw(st.integers(checkpoint, num_steps))
                flushed = data.draw(st.integers(checkpoint, reached))
                log.resume(checkpoint)
                for step in range(checkpoint + 1, reached + 1):
                    log.log(step, {"batch/loss": loss(step)})
                paths.append(segment(folder, number, range(checkpoint + 1, flushed + 1)))
                checkpoint = data.draw(st.integers(checkpoint, reached))
            log.resume(checkpoint)
            for step in range(checkpoint + 1, num_steps + 1):
                log.log(step, {"batch/loss": loss(step)})
        paths.append(segment(folder, 9, range(checkpoint + 1, num_steps + 1)))
        merged = merge(Source("a-base", tuple(paths), folder / "metrics.jsonl"))
        assert losses(merged) == {step: loss(step) for step in range(1, num_steps + 1)}
        assert [json.loads(row[("_step",)]) for row in merged.rows.values()] == list(range(1, num_steps + 1))


def test_without_our_metrics_a_later_segment_replaces_what_it_repeats(tmp_path):
    paths = segment(tmp_path, 1, range(10)), segment(tmp_path, 2, range(8, 15))
    merged = merge(Source("a-base", paths))
    assert losses(merged) == {step: loss(step) for step in range(15)}
    # W&B's own clock starts at 0 in every process.
    runtimes = [json.loads(row[("_runtime",)]) for row in merged.rows.values()]
    assert runtimes == sorted(runtimes)


def test_without_our_metrics_what_came_after_the_step_of_a_restart_is_gone(tmp_path):
    paths = segment(tmp_path, 1, range(10)), segment(tmp_path, 2, range(5, 7))
    assert losses(merge(Source("a-base", paths))) == {step: loss(step) for step in range(7)}


def test_steps_that_a_trainer_did_not_tell_are_counted_on(tmp_path):
    first = segment(tmp_path, 1, range(4), explicit=False)
    second = segment(tmp_path, 2, range(4, 6), explicit=False, own_steps=[0, 1])
    assert losses(merge(Source("a-base", (first, second)))) == {step: loss(step) for step in range(6)}


def test_a_segment_that_holds_nothing_is_passed_over(tmp_path):
    empty = tmp_path / "run-a-base.wandb"
    empty.touch()
    assert len(merge(Source("a-base", (empty, segment(tmp_path, 1, range(3))))).rows) == 3
    with pytest.raises(DataError, match="holds no run"):
        merge(Source("a-base", (empty,)))


def test_console_lines_are_whole_in_their_order_and_none_is_glued_to_another(tmp_path):
    first = segment(tmp_path, 1, [0], lines=["one", "\n", "two\nthr", "ee\n", "cut off"])
    second = segment(tmp_path, 2, [1], lines=["four\n"])
    merged = merge(Source("a-base", (first, second)))
    assert [record.output_raw.line for record in merged.lines] == ["one\n", "two\n", "three\n", "cut off\n", "four\n"]


def test_only_what_a_server_lacks_is_in_the_records_for_it(tmp_path):
    merged = merge(Source("a-base", (segment(tmp_path, 1, range(5), lines=["one\n", "two\n"]),)))
    records = merged.records(after_step=2, num_lines=1, num_stats=0, sent=[])
    assert [record.history.step.num for record in records if record.HasField("history")] == [3, 4]
    assert [record.output_raw.line for record in records if record.HasField("output_raw")] == ["two\n"]
    (summary,) = [record.summary for record in records if record.HasField("summary")]
    assert {item.nested_key[0]: item.value_json for item in summary.update}["batch/loss"] == json.dumps(loss(4))

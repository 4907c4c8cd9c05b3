import json
import re

import pytest

from nanochat.errors import DataError, UsageError
from nanochat.tracking.compare import AXES, ComparedRun, differences, say_differences, write_comparison
from nanochat.tracking.metrics import MetricsLog
from nanochat.tracking.runs import RunRecord
from nanochat.tracking.wandb_run import name_run

CONFIG = {
    "runtime/git_commit": "abc",
    "runtime/git_dirty": False,
    "runtime/image": "f00",
    "runtime/device": "H100",
    "runtime/world_size": 8,
    "dtype": "bfloat16",
    "data/fingerprint": "one",
    "tokenizer": "same",
    "train/tokens_per_step": 1000,
    "model/flops_per_token": 6,
    "identity": {"depth": 2, "data": "one", "recipe": {"num_steps": 3}},
}


def record(name, **changes):
    names = name_run(name, "base")
    return RunRecord(name, "base", "d2", 3, names, None, {**CONFIG, **changes}, started=0.0, state="finished")


@pytest.fixture
def compared(tmp_path):
    def make(name, **changes):
        folder = tmp_path / name
        record(name, **changes).write(folder)
        with MetricsLog(folder / "metrics.jsonl") as log:
            log.log(0, {"epoch/bpb": 3.0})
            for step in (1, 2, 3):
                log.log(step, {"batch/loss": 9 - step, "batch/train_seconds": 2.0 * step, "batch/tokens": 1000 * step})
            log.log(3, {"epoch/bpb": 2.0, "batch/smoothed_loss": float("nan")})
        return ComparedRun.read(folder, name)

    return make


def test_only_what_differs_is_named_and_the_rest_is_said_to_be_the_same():
    other = {"data/fingerprint": "two", "identity": {"depth": 2, "data": "two", "recipe": {"num_steps": 4}}}
    found = differences({"a": record("a"), "b": record("b", **other)})
    assert found["data"] == {"data/fingerprint": {"a": "one", "b": "two"}}
    assert found["settings"] == {"recipe.num_steps": {"a": 3, "b": 4}}
    assert [aspect for aspect, fields in found.items() if fields] == ["data", "settings"]
    said = say_differences(found)
    assert "They differ in data (data/fingerprint); settings (recipe.num_steps)." in said
    assert "The same: code, image, tokenizer, machine." in said
    assert say_differences(differences({"a": record("a"), "b": record("b")})).startswith("Nothing is known to differ")


def test_code_that_was_changed_since_its_commit_is_never_the_same():
    dirty = {"runtime/git_dirty": True}
    assert differences({"a": record("a", **dirty), "b": record("b", **dirty)})["code"]


def test_a_curve_is_drawn_over_steps_tokens_flops_and_time(compared):
    run = compared("a")
    expected = {"step": [0, 3], "tokens": [0, 3000], "flops": [0, 18000], "seconds": [0, 6.0]}
    assert {axis: run.curve(["epoch/bpb"], axis) for axis in AXES} == {
        axis: (x, [3.0, 2.0]) for axis, x in expected.items()
    }


def test_the_page_needs_no_other_file_and_holds_every_point(compared, tmp_path):
    runs = [compared("a"), compared("b </script><b>", **{"data/fingerprint": "two"})]
    page = write_comparison(tmp_path / "out", runs, "a <vs> b")
    text = page.read_text()
    assert not re.findall(r"(?:src|href)=\"(?!data:)", text)
    assert "<!--" not in text
    assert "a &lt;vs&gt; b" in text
    assert text.count("data:image/png;base64,") == 2
    assert {path.name for path in page.parent.iterdir()} == {"index.html", "comparison.json", "loss.png", "bpb.png"}
    (data,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)
    curves = json.loads(data)["curves"]["bpb"]["tokens"]
    assert list(curves) == ["a", "b </script><b>"]
    assert curves["a"] == [[0, 3000], [3.0, 2.0]]
    stored = json.loads((page.parent / "comparison.json").read_text())
    assert stored["figures"]["a"]["steps"] == 3


def test_figures_are_spelt_as_people_read_them(compared, tmp_path):
    page = write_comparison(tmp_path / "out", [compared("a"), compared("b")], "a vs b").read_text()
    assert "<tr><th>tokens</th><td>3,000</td><td>3,000</td></tr>" in page


def test_only_an_earlier_comparison_is_replaced(compared, tmp_path):
    runs = [compared("a"), compared("b")]
    write_comparison(tmp_path / "out", runs, "first")
    assert "second" in write_comparison(tmp_path / "out", runs, "second").read_text()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "precious.parquet").write_text("years of work")
    with pytest.raises(UsageError, match="holds something else than a comparison"):
        write_comparison(tmp_path / "data", runs, "third")
    assert (tmp_path / "data" / "precious.parquet").read_text() == "years of work"


def test_one_run_alone_or_one_without_metrics_is_refused(compared, tmp_path):
    with pytest.raises(UsageError, match="two or more different runs"):
        write_comparison(tmp_path / "out", [compared("a")], "a")
    folder = tmp_path / "empty"
    MetricsLog(folder / "metrics.jsonl").close()
    with pytest.raises(DataError, match="has no rows yet"):
        ComparedRun.read(folder, "empty")

"""The best rows of a corpus, exactly as many as asked for, and all of them in order."""

import math
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fat_corpus import COLUMNS, SILENT, run_killed, shard_bytes, shard_rows, source_rows, write_fat_corpus, write_rows
from nanochat.corpus import preparation as preparing
from nanochat.corpus import ranking as ranks
from nanochat.corpus.preparation import complete
from nanochat.corpus.ranking import prepare_ranking, read_keys
from nanochat.corpus.sources import SourceRequest
from nanochat.errors import UsageError

fresh_name = count()
ANY = {"suppress_health_check": [HealthCheck.function_scoped_fixture], "deadline": None}


@pytest.fixture(scope="module")
def fat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fat_corpus(tmp_path_factory.mktemp("fat"))


def ranked(folder: Path, place: Path, workers: int = 1, **changes: Any) -> dict[str, Any]:
    options: dict[str, Any] = {
        "by": ("score",),
        "descending": True,
        "top": None,
        "columns": COLUMNS,
        "rows_per_shard": 50,
        "validation_rows": 20,
        "seed": 1,
        **changes,
    }
    preparation, ranking = prepare_ranking(folder, SourceRequest(place=str(place), split="train"), **options)
    read_keys(preparation, ranking, workers, SILENT)
    return complete(preparation, workers, SILENT)


def order_of(values: list[Any], descending: bool) -> list[int]:
    """Rows in order: nulls and NaN last, ties as they come."""
    is_last = [value is None or math.isnan(value) for value in values]
    sign = -1 if descending else 1
    return sorted(range(len(values)), key=lambda row: (is_last[row], 0 if is_last[row] else sign * values[row]))


@pytest.mark.parametrize("descending", [True, False])
@pytest.mark.parametrize("top", [0.165, None])
def test_several_keys_decide_in_turn_with_nulls_last(
    fat: Path, tmp_path: Path, descending: bool, top: float | None
) -> None:
    manifest = ranked(tmp_path / "c", fat, by=("score", "token_count"), descending=descending, top=top)
    rows = source_rows(fat)
    sign = -1 if descending else 1
    order = sorted(
        range(len(rows)),
        key=lambda row: (
            rows[row]["score"] is None,
            sign * (rows[row]["score"] or 0),
            sign * rows[row]["token_count"],
        ),
    )
    if top is not None:
        order = sorted(order[: round(top * len(rows))])
    val = {row["text"] for row in shard_rows(manifest, tmp_path / "c", "val")}
    expected = [rows[row] for row in order if (rows[row]["text"] or "").strip() and rows[row]["text"] not in val]
    train = shard_rows(manifest, tmp_path / "c", "train")
    assert [row["id"] for row in train] == [row["id"] for row in expected]
    assert manifest["details"]["rows_chosen"] == len(order)
    assert 0 < len(val) <= 20


some_numbers = st.one_of(
    st.lists(st.none() | st.floats(), min_size=2, max_size=40),
    st.lists(st.none() | st.integers(-(2**63) + 1, 2**63 - 2), min_size=2, max_size=40),
    st.lists(st.none() | st.integers(-2, 2), min_size=2, max_size=40),
)


@settings(max_examples=25, **ANY)
@given(values=some_numbers, top=st.floats(0.01, 1), descending=st.booleans(), cut=st.integers(0, 40))
@example(values=[0.0, -0.0, math.inf, -math.inf, math.nan, None, -1.5], top=0.5, descending=False, cut=3)
@example(values=[0.0, -0.0], top=0.5, descending=False, cut=3)
def test_exactly_the_best_are_kept_whatever_the_numbers_and_however_files_divide_them(
    tmp_path: Path, values: list[Any], top: float, descending: bool, cut: int
) -> None:
    folder = tmp_path / str(next(fresh_name))
    table = pa.table({"text": [f"text {row}" for row in range(len(values))], "score": values})
    if table["score"].type == pa.null():
        return
    for index, part in enumerate((table.slice(0, cut), table.slice(cut))):
        write_rows(folder / "source" / f"{index}.parquet", part, 7)
    preparation, ranking = prepare_ranking(
        folder / "c",
        SourceRequest(place=str(folder / "source")),
        by=("score",),
        descending=descending,
        top=top,
        columns=("text",),
        rows_per_shard=10,
        validation_rows=1,
        seed=0,
    )
    total, kept, unscored = read_keys(preparation, ranking, 1, SILENT)
    masks = [preparation.choice.of_file(index, file) for index, file in enumerate(preparation.source.files)]
    sizes = [min(cut, len(values)), max(0, len(values) - cut)]
    chosen = [row for mask, size in zip(masks, sizes) for row in mask(0, size).tolist()]
    best = order_of(values, descending)[: max(1, round(top * len(values)))]
    assert [row for row, is_chosen in enumerate(chosen) if is_chosen] == sorted(best)
    assert (total, kept) == (len(values), len(best))
    assert unscored == sum(values[row] is None or math.isnan(values[row]) for row in best)


def test_small_steps_in_memory_change_nothing(fat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ranked(tmp_path / "whole", fat)
    top = ranked(tmp_path / "top", fat, top=0.2)
    monkeypatch.setattr(ranks, "RUN_BYTES", 2000)
    monkeypatch.setattr(ranks, "ROWS_AT_ONCE", 11)
    monkeypatch.setattr(preparing, "SORTED_ROWS_AT_ONCE", 13)
    assert ranked(tmp_path / "steps", fat)["fingerprint"] == whole["fingerprint"]
    assert ranked(tmp_path / "top_steps", fat, top=0.2)["fingerprint"] == top["fingerprint"]


def test_killed_again_and_again_the_order_is_the_same(fat: Path, tmp_path: Path) -> None:
    arguments = ["data", "rank", f"--source={fat}", "--by=score,token_count", "--sort", "--rows-per-shard=20"]
    assert run_killed([*arguments, "--workers=1", f"--output={tmp_path / 'whole'}"], None) == 0
    interrupted = [*arguments, "--workers=1", f"--output={tmp_path / 'killed'}"]
    for delay in (0.05, 0.15, 0.25):
        run_killed(interrupted, delay)
    assert run_killed(interrupted, None) == 0
    assert shard_bytes(tmp_path / "killed") == shard_bytes(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"by": ("text",)}, "column 'text' holds string, not numbers"),
        ({"by": ("quality",)}, "has no column 'quality'"),
        ({"by": ("",)}, "nothing to rank by"),
        ({"top": 0.0}, "cannot be taken"),
        ({"top": 2.0}, "cannot be taken"),
    ],
)
def test_a_ranking_without_sense_is_refused(fat: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ranked(tmp_path / "c", fat, **changes)


def test_what_to_do_with_the_rows_must_be_said(run_command: Any, tmp_path: Path) -> None:
    for flags in ([], ["--sort", "--top=0.5"]):
        refused = run_command("data", "rank", "--by=score", f"--source={tmp_path}", *flags)
        assert refused.returncode == 2
        assert refused.stderr.endswith("give either --top SHARE or --sort\n")

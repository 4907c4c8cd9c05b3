import os
from collections import Counter
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanochat.corpus.shards import adopt, open_corpus, read_column, read_texts, shard_paths, write_corpus
from nanochat.errors import DataError, UsageError
from nanochat.files import MANIFEST_NAME

FIX = "make it again"
SOURCE = {"name": "test"}
fresh_name = count()


def write(folder: Path, texts: Any, **changes: Any) -> dict[str, Any]:
    options = {"rows_per_shard": 10, "source": SOURCE, "validation_rows": 5, **changes}
    return write_corpus(folder, texts, **options)


def both_splits(folder: Path) -> tuple[list[str], list[str]]:
    return list(read_texts(folder, "train", FIX)), list(read_texts(folder, "val", FIX))


def write_parquet(path: Path, **columns: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


some_texts = st.lists(
    st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from("ab"), min_size=1, max_size=60
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=some_texts, rows_per_shard=st.integers(1, 20), validation_rows=st.integers(1, 20))
def test_every_text_is_kept_once_and_none_is_in_both_splits(
    tmp_path: Path, texts: list[str], rows_per_shard: int, validation_rows: int
) -> None:
    folder = tmp_path / str(next(fresh_name))
    kept = [text for text in texts if text.strip()]
    if len(set(kept)) < 2:
        with pytest.raises(UsageError, match="fewer than two different documents"):
            write(folder, texts, rows_per_shard=rows_per_shard, validation_rows=validation_rows)
        return
    manifest = write(folder, texts, rows_per_shard=rows_per_shard, validation_rows=validation_rows)
    train, val = both_splits(folder)
    assert Counter(train + val) == Counter(kept)
    assert not set(train) & set(val)
    assert train
    assert 1 <= len(set(val)) <= validation_rows
    assert len(set(val)) == 1 or len(val) <= len(kept) / 10
    assert manifest["empty_texts_skipped"] == len(texts) - len(kept)
    assert manifest["totals"]["train"]["text_bytes"] == sum(len(text.encode()) for text in train)
    assert manifest["totals"]["val"]["characters"] == sum(map(len, val))
    assert [entry["rows"] for entry in manifest["files"][:-2]] == [rows_per_shard] * (len(manifest["files"]) - 2)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations([f"document {n}" for n in range(80)]), seed=st.integers(0, 5))
def test_the_validation_set_does_not_depend_on_the_order_of_the_texts(
    tmp_path: Path, order: list[str], seed: int
) -> None:
    one, other = tmp_path / str(next(fresh_name)), tmp_path / str(next(fresh_name))
    write(one, order, seed=seed)
    write(other, sorted(order), seed=seed)
    assert shard_paths(one, "val", FIX)[0].read_bytes() == shard_paths(other, "val", FIX)[0].read_bytes()


def test_another_seed_takes_another_validation_set(tmp_path: Path) -> None:
    texts = [f"document {n}" for n in range(200)]
    write(tmp_path / "a", texts, seed=1)
    write(tmp_path / "b", texts, seed=2)
    assert both_splits(tmp_path / "a")[1] != both_splits(tmp_path / "b")[1]


def test_every_stretch_of_the_stream_is_in_the_validation_set(tmp_path: Path) -> None:
    kinds = ["topic", "docstring", "source"]
    write(tmp_path / "c", (f"{kind} {n}" for kind in kinds for n in range(1000)), validation_rows=200)
    found = Counter(text.split()[0] for text in both_splits(tmp_path / "c")[1])
    assert all(40 <= found[kind] <= 95 for kind in kinds)


def test_shards_are_numbered_typed_and_cut_in_small_row_groups(tmp_path: Path) -> None:
    write(tmp_path / "c", (f"document {n}" for n in range(5000)), rows_per_shard=3000, validation_rows=400)
    names = sorted(path.name for path in (tmp_path / "c").glob("*.parquet"))
    assert names == ["shard_00000.parquet", "shard_00001.parquet", "shard_00002.parquet"]
    assert [path.name for path in shard_paths(tmp_path / "c", "val", FIX)] == names[-1:]
    parquet = pq.ParquetFile(tmp_path / "c" / names[0])
    assert parquet.schema_arrow.field("text").type == pa.string()
    groups = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
    assert groups == [1024, 1024, 952]
    assert parquet.metadata.row_group(0).column(0).compression == "ZSTD"


def test_lone_surrogates_are_replaced_and_counted(tmp_path: Path) -> None:
    manifest = write(tmp_path / "c", ["bad \udc80 byte", "pair \ud83d\ude00", "fine 😀", "fine too"])
    assert manifest["invalid_texts_repaired"] == 2
    train, val = both_splits(tmp_path / "c")
    assert sorted(train + val) == ["bad \ufffd byte", "fine too", "fine 😀", "pair 😀"]


def test_texts_are_streamed_and_not_gathered_first(tmp_path: Path) -> None:
    def texts() -> Any:
        for n in range(60):
            if n == 50:
                (building,) = tmp_path.glob(".tmp-*")
                assert len(list(building.glob("shard_*.parquet"))) >= 4
            yield f"document {n}"

    write(tmp_path / "c", texts())
    assert len(both_splits(tmp_path / "c")[0]) == 55


def test_a_writer_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    def texts() -> Any:
        yield from (f"document {n}" for n in range(40))
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        write(tmp_path / "c", texts())
    assert list(tmp_path.iterdir()) == []


def test_the_same_corpus_is_kept_without_reading_its_texts_again(tmp_path: Path) -> None:
    def unread() -> Any:
        raise AssertionError("read again")
        yield

    first = write(tmp_path / "c", (f"document {n}" for n in range(40)))
    assert write(tmp_path / "c", unread()) == first


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    write(tmp_path / "c", (f"document {n}" for n in range(40)))
    assert open_corpus(tmp_path / "c", FIX).train_rows == 36


@pytest.mark.parametrize(
    "changes",
    [{"source": {"name": "other"}}, {"rows_per_shard": 11}, {"validation_rows": 6}, {"seed": 1}],
    ids=lambda changes: next(iter(changes)),
)
def test_another_corpus_is_never_overwritten(tmp_path: Path, changes: dict[str, Any]) -> None:
    before = write(tmp_path / "c", (f"document {n}" for n in range(40)))
    with pytest.raises(UsageError, match="already holds another corpus"):
        write(tmp_path / "c", ["a", "b"], **changes)
    assert open_corpus(tmp_path / "c", FIX, checksums=True).manifest == before


def test_a_folder_with_other_files_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match=r"c already holds something that is not a corpus"):
        write(tmp_path / "c", ["a", "b"])
    assert (tmp_path / "c" / "thesis.txt").read_text() == "years of work"


def test_two_writers_of_the_same_corpus_both_succeed(tmp_path: Path) -> None:
    texts = [f"document {n}" for n in range(40)]

    def texts_while_another_writer_finishes() -> Any:
        yield from texts[:20]
        write(tmp_path / "c", texts)
        yield from texts[20:]

    assert write(tmp_path / "c", texts_while_another_writer_finishes())["totals"]["train"]["rows"] == 36
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_details_counted_while_reading_are_in_the_manifest(tmp_path: Path) -> None:
    details = {"read": 0}

    def texts() -> Any:
        for n in range(40):
            details["read"] += 1
            yield f"document {n}"

    assert write(tmp_path / "c", texts(), details=details)["details"] == {"read": 40}


@pytest.mark.parametrize("changes", [{"rows_per_shard": 0}, {"validation_rows": 0}])
def test_a_layout_without_rows_is_refused(tmp_path: Path, changes: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="is empty"):
        write(tmp_path / "c", ["a", "b"], **changes)


def test_a_truncated_shard_is_noticed_on_opening(tmp_path: Path) -> None:
    write(tmp_path / "c", (f"document {n}" for n in range(40)))
    shard = tmp_path / "c" / "shard_00000.parquet"
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(DataError, match="shard_00000"):
        open_corpus(tmp_path / "c", FIX)


def test_a_flipped_bit_is_noticed_on_reading(tmp_path: Path) -> None:
    write(tmp_path / "c", (f"document {n} {os.urandom(8).hex()}" for n in range(40)), rows_per_shard=100)
    shard = tmp_path / "c" / "shard_00000.parquet"
    content = bytearray(shard.read_bytes())
    content[200] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"shard_00000\.parquet is damaged"):
        list(read_texts(tmp_path / "c", "train", FIX))
    with pytest.raises(DataError, match="checksum"):
        open_corpus(tmp_path / "c", FIX, checksums=True)


@pytest.mark.parametrize("content", ["{}", '{"kind": "corpus"}', '{"kind": "corpus", "files": [1]}', "{", "[]"])
def test_a_damaged_manifest_is_one_clear_error(tmp_path: Path, content: str) -> None:
    (tmp_path / MANIFEST_NAME).write_text(content)
    with pytest.raises(DataError, match=MANIFEST_NAME):
        open_corpus(tmp_path, FIX)


def test_a_folder_without_a_manifest_is_no_corpus_and_the_error_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"manifest\.json is missing — make it again"):
        open_corpus(tmp_path, FIX)


def test_shards_of_another_tool_are_adopted_with_the_last_one_for_validation(tmp_path: Path) -> None:
    for index in range(3):
        texts = [f"Grüße {index} {n}" for n in range(4)]
        write_parquet(tmp_path / f"shard_{index:05d}.parquet", text=texts, token_count=[1, 2, 3, 4])
    corpus = adopt(tmp_path)
    assert (corpus.train_rows, corpus.val_rows) == (8, 4)
    assert corpus.manifest["totals"]["val"] == {"rows": 4, "characters": 36, "text_bytes": 44}
    assert list(read_texts(tmp_path, "val", FIX)) == texts
    assert adopt(tmp_path) == corpus


def spoil_truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def spoil_empty(path: Path) -> None:
    path.write_bytes(b"")


def spoil_no_rows(path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)


def spoil_column(path: Path) -> None:
    write_parquet(path, content=["a"], url=["b"])


def spoil_type(path: Path) -> None:
    write_parquet(path, text=[1, 2])


def spoil_null(path: Path) -> None:
    write_parquet(path, text=["a", None])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_truncated, "is damaged"),
        (spoil_empty, "is damaged"),
        (spoil_no_rows, "has no rows"),
        (spoil_column, r"no column 'text' \(it has: content, url\)"),
        (spoil_type, "holds int64, not text"),
        (spoil_null, "rows without text"),
    ],
)
def test_a_spoilt_shard_is_not_adopted_and_the_error_names_it(tmp_path: Path, spoil: Any, message: str) -> None:
    for index in range(3):
        write_parquet(tmp_path / f"shard_{index:05d}.parquet", text=["a", "b"])
    spoil(tmp_path / "shard_00001.parquet")
    with pytest.raises(DataError, match=message) as caught:
        adopt(tmp_path)
    assert "shard_00001.parquet" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / MANIFEST_NAME).exists()


def test_one_shard_alone_is_not_adopted(tmp_path: Path) -> None:
    write_parquet(tmp_path / "shard_00000.parquet", text=["a", "b"])
    with pytest.raises(DataError, match="has 1 shard"):
        adopt(tmp_path)


def test_large_strings_and_nulls_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"body": pa.array(["a", None, "c"], pa.large_string())}), path)
    assert list(read_column(path, "body", FIX)) == ["a", None, "c"]

"""A random share of a corpus: always the same rows, whoever draws them, and only the wanted bytes."""

import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fat_corpus import COLUMNS, SILENT, run_killed, shard_bytes, shard_rows, source_rows, write_fat_corpus, write_rows
from nanochat.corpus.preparation import Preparation, Progress, complete, finished_manifest, make_part
from nanochat.corpus.sampling import Draw, prepare_subset
from nanochat.corpus.shards import open_corpus, read_texts, write_corpus
from nanochat.corpus.sources import SourceFile, SourceRequest
from nanochat.errors import UsageError
from nanochat.files import leases

fresh_name = count()


@pytest.fixture(scope="module")
def fat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fat_corpus(tmp_path_factory.mktemp("fat"))


def prepared(folder: Path, place: Path, **changes: Any) -> Preparation:
    options: dict[str, Any] = {
        "ratio": 0.4,
        "seed": 42,
        "columns": COLUMNS,
        "rows_per_shard": 50,
        "validation_rows": 20,
        **changes,
    }
    return prepare_subset(folder, SourceRequest(place=str(place), split="train"), **options)


def test_each_row_is_chosen_by_seed_file_name_and_number_alone() -> None:
    file = SourceFile("data/a.parquet", 1, "")
    whole = Draw(0.3, 42).of_file(0, file)(0, 1000)
    chooser = Draw(0.3, 42).of_file(7, SourceFile("data/a.parquet", 2, "other content"))
    parts = [chooser(first, rows) for first, rows in ((0, 1), (1, 600), (601, 399))]
    assert (np.concatenate(parts) == whole).all()
    assert not (Draw(0.3, 43).of_file(0, file)(0, 1000) == whole).all()
    assert not (Draw(0.3, 42).of_file(0, SourceFile("data/b.parquet", 1, ""))(0, 1000) == whole).all()


def philox(key: int, number: int) -> int:
    """The `number`-th output of Philox4x64-10 by its definition, as numpy counts: the first block has counter 1."""
    counter, keys, mask = [number // 4 + 1, 0, 0, 0], [key & (2**64 - 1), key >> 64], 2**64 - 1
    for _ in range(10):
        first, second = counter[0] * 0xD2E7470EE14C6C93, counter[2] * 0xCA5A826395121157
        counter = [
            (second >> 64) ^ counter[1] ^ keys[0],
            second & mask,
            (first >> 64) ^ counter[3] ^ keys[1],
            first & mask,
        ]
        keys = [(keys[0] + 0x9E3779B97F4A7C15) & mask, (keys[1] + 0xBB67AE8584CAA73B) & mask]
    return counter[number % 4]


def test_a_published_sample_can_be_drawn_again_without_numpy() -> None:
    digest = hashlib.sha256(b"42\0data/a.parquet").digest()
    key = int.from_bytes(digest[:16], "little")
    by_definition = [philox(key, row) < int(0.3 * 2**64) for row in range(200)]
    assert Draw(0.3, 42).of_file(0, SourceFile("data/a.parquet", 1, ""))(0, 200).tolist() == by_definition


def test_a_larger_share_has_all_rows_of_a_smaller_one() -> None:
    file = SourceFile("data/a.parquet", 1, "")
    small, large = (Draw(ratio, 42).of_file(0, file)(0, 100_000) for ratio in (0.165, 0.5))
    assert not (small & ~large).any()
    # Six standard deviations of a binomial.
    assert abs(small.sum() - 16_500) < 6 * (100_000 * 0.165 * 0.835) ** 0.5
    assert Draw(1.0, 42).of_file(0, file)(0, 1000).all()


def test_the_corpus_holds_the_chosen_rows_in_order_and_counts_them_all(fat: Path, tmp_path: Path) -> None:
    preparation = prepared(tmp_path / "corpus", fat)
    manifest = complete(preparation, 1, SILENT)
    chosen = []
    for index, file in enumerate(preparation.source.files):
        rows = pq.read_table(fat / file.name, columns=[*COLUMNS]).to_pylist()
        mask = preparation.choice.of_file(index, file)(0, len(rows))
        chosen += [row for row, is_chosen in zip(rows, mask) if is_chosen]
    with_text = [row for row in chosen if row["text"] and row["text"].strip()]
    train, val = (shard_rows(manifest, tmp_path / "corpus", split) for split in ("train", "val"))
    val_texts = {row["text"] for row in val}
    assert len(val_texts) == 20
    assert train == [row for row in with_text if row["text"] not in val_texts]
    assert sorted(row["id"] for row in val) == sorted(row["id"] for row in with_text if row["text"] in val_texts)
    assert manifest["details"]["rows_read"] == 900
    assert manifest["details"]["rows_chosen"] == len(chosen)
    assert manifest["details"]["null_texts_skipped"] == sum(row["text"] is None for row in chosen)
    assert manifest["empty_texts_skipped"] == sum(row["text"] == " \n" for row in chosen)
    assert manifest["totals"]["train"]["token_count"] == sum(row["token_count"] for row in train)
    assert manifest["schema"] == {"text": "string", "id": "string", "token_count": "int64"}
    sizes = [entry["rows"] for entry in manifest["files"] if entry["split"] == "train"]
    assert sizes[:-1] == [50] * (len(sizes) - 1)
    assert open_corpus(tmp_path / "corpus", "", checksums=True).train_rows == len(train)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.integers(1, 4), order=st.randoms(), group=st.integers(1, 400), rows=st.sampled_from([33, 50]))
def test_parts_in_any_order_and_any_row_groups_give_the_same_bytes(
    fat: Path, tmp_path: Path, parts: int, order: Any, group: int, rows: int
) -> None:
    folder = tmp_path / str(next(fresh_name))
    for path in fat.rglob("*.parquet"):
        write_rows(folder / "source" / path.relative_to(fat), pq.read_table(path), group)
    expected = tmp_path / f"expected-{rows}"
    if not expected.exists():
        complete(prepared(expected, fat, rows_per_shard=rows), 1, SILENT)
    numbers = list(range(1, parts + 1))
    order.shuffle(numbers)
    for number in numbers[: parts - 1]:
        make_part(prepared(folder / "c", folder / "source", rows_per_shard=rows), f"{number}/{parts}", 1, SILENT)
    complete(prepared(folder / "c", folder / "source", rows_per_shard=rows), 1, SILENT)
    assert shard_bytes(folder / "c") == shard_bytes(expected)


@pytest.mark.parametrize("copies", [2, 12])
def test_a_corpus_full_of_copies_keeps_nine_tenths_for_training(tmp_path: Path, copies: int) -> None:
    texts = [f"text {number}" for number in range(200)]
    for copy in range(copies):
        write_rows(tmp_path / "source" / f"{copy:02}.parquet", pa.table({"text": texts}), 50)
    request = SourceRequest(place=str(tmp_path / "source"))
    layout = {"rows_per_shard": 10**4, "validation_rows": 10_000, "seed": 1}
    subset = prepare_subset(tmp_path / "c", request, ratio=1.0, columns=("text",), **layout)
    manifest = complete(subset, 1, SILENT)
    write_corpus(tmp_path / "local", texts * copies, source={}, **layout)
    assert manifest["totals"]["val"]["rows"] == 20 * copies
    both = [sorted(read_texts(tmp_path / name, "val", "")) for name in ("c", "local")]
    assert both[0] == both[1]


def test_several_workers_give_the_same_bytes_and_manifest(fat: Path, tmp_path: Path) -> None:
    one = complete(prepared(tmp_path / "one", fat), 1, SILENT)
    two = complete(prepared(tmp_path / "two", fat), 2, SILENT)
    assert shard_bytes(tmp_path / "one") == shard_bytes(tmp_path / "two")
    assert one["fingerprint"] == two["fingerprint"]


def test_killed_again_and_again_it_ends_in_the_same_bytes(fat: Path, tmp_path: Path) -> None:
    arguments = ["data", "subset", f"--source={fat}", "--ratio=0.4", "--rows-per-shard=20", "--validation-rows=20"]
    assert run_killed([*arguments, "--workers=1", f"--output={tmp_path / 'whole'}"], None) == 0
    interrupted = [*arguments, "--workers=2", f"--output={tmp_path / 'killed'}"]
    for delay in (0.1, 0.7):
        run_killed(interrupted, delay)
    assert run_killed(interrupted, None) == 0
    assert shard_bytes(tmp_path / "killed") == shard_bytes(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "whole"]


def test_force_replaces_a_corpus_and_nothing_else(fat: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "precious").write_text("years of work")
    with pytest.raises(UsageError, match=r"not a corpus with a manifest — choose another --output$"):
        finished_manifest(prepared(tmp_path / "home", fat), force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    complete(prepared(tmp_path / "c", fat), 1, SILENT)
    assert finished_manifest(prepared(tmp_path / "c", fat, seed=9), force=True) is None


def test_what_stands_in_the_way_of_a_corpus_is_told_without_internals(fat: Path, tmp_path: Path) -> None:
    complete(prepared(tmp_path / "c", fat), 1, SILENT)
    with pytest.raises(UsageError, match=r"another corpus .*name=subset .*--output.*--force") as caught:
        finished_manifest(prepared(tmp_path / "c", fat, seed=9), force=False)
    assert "{" not in str(caught.value)


def test_what_is_there_already_is_kept_and_another_corpus_never_replaced_unasked(fat: Path, tmp_path: Path) -> None:
    first = complete(prepared(tmp_path / "c", fat), 1, SILENT)
    assert finished_manifest(prepared(tmp_path / "c", fat), force=False) == first
    with pytest.raises(UsageError, match="already holds another corpus"):
        finished_manifest(prepared(tmp_path / "c", fat, seed=1), force=False)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    other = prepared(tmp_path / "c", fat, seed=1)
    assert finished_manifest(other, force=True) is None
    assert complete(other, 1, SILENT, force=True)["source"]["draw_seed"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_finished_corpus_asked_for_again_is_found_without_writing_anything(fat: Path, tmp_path: Path) -> None:
    made = complete(prepared(tmp_path / "corpus", fat), 1, SILENT)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path, tmp_path / "corpus")}
    assert finished_manifest(prepared(tmp_path / "corpus", fat), force=False) == made
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_the_folder_that_is_read_says_so_until_the_corpus_is_made(fat: Path, tmp_path: Path) -> None:
    seen: list[str] = []

    @contextmanager
    def watch(what: str, total: int) -> Iterator[Progress]:
        seen.extend(f"{what}: {lease.what}" for lease in leases(fat))
        with SILENT(what, total) as progress:
            yield progress

    make_part(prepared(tmp_path / "corpus", fat), "1/2", 1, watch)
    complete(prepared(tmp_path / "corpus", fat), 1, watch)
    making = f"the making of {tmp_path / 'corpus'}"
    assert seen == [
        f"reading: part 1/2 of {tmp_path / 'corpus'}",
        f"reading: {making}",
        f"writing shards: {making}",
    ]
    assert leases(fat) == []


def test_unfinished_work_on_another_corpus_is_not_mixed_in(fat: Path, tmp_path: Path) -> None:
    make_part(prepared(tmp_path / "c", fat), "1/3", 1, SILENT)
    with pytest.raises(UsageError, match=r"c\.unfinished holds unfinished work on another corpus"):
        prepared(tmp_path / "c", fat, ratio=0.5)
    # A slip of which nothing was made is forgotten.
    prepared(tmp_path / "d", fat, ratio=0.5)
    assert prepared(tmp_path / "d", fat).choice == Draw(0.4, 42)


def test_a_source_that_changes_under_the_work_is_noticed(fat: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(fat, tmp_path / "source"))
    preparation = prepared(tmp_path / "c", place)
    path = place / preparation.source.files[1].name
    write_rows(path, pq.read_table(path).slice(1), 60)
    with pytest.raises(Exception, match=r"train-00001.*(is not the file that was there|no whole parquet)"):
        complete(preparation, 1, SILENT)


def test_columns_of_unlike_types_are_refused(tmp_path: Path) -> None:
    for index, counts in enumerate(([1, 2], [1.5, 2.5])):
        write_rows(tmp_path / "s" / f"{index}.parquet", pa.table({"text": ["a", "b"], "token_count": counts}))
    preparation = prepare_subset(
        tmp_path / "c",
        SourceRequest(place=str(tmp_path / "s")),
        ratio=1,
        seed=0,
        columns=("text", "token_count"),
        rows_per_shard=10,
        validation_rows=1,
    )
    with pytest.raises(UsageError, match=r"1\.parquet has other types of columns"):
        complete(preparation, 1, SILENT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratio": 0}, "cannot be taken"),
        ({"ratio": 1.1}, "cannot be taken"),
        ({"columns": ("id",)}, "cannot have the columns id"),
        ({"columns": ("text", "text")}, "cannot have the columns text,text"),
        ({"rows_per_shard": 0}, "is empty"),
    ],
)
def test_a_request_without_sense_is_refused(fat: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        prepared(tmp_path / "c", fat, **changes)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("part", ["0/3", "4/3", "3", "a/b"])
def test_a_part_that_is_none_is_refused(fat: Path, tmp_path: Path, part: str) -> None:
    with pytest.raises(UsageError, match="is no part"):
        make_part(prepared(tmp_path / "c", fat), part, 1, SILENT)


def test_the_commands_make_parts_and_complete_them(
    fat: Path, run_command: Callable[..., CompletedProcess[str]], tmp_path: Path
) -> None:
    arguments = ("data", "subset", f"--source={fat}", "--ratio=0.4", "--workers=1")
    assert run_command(*arguments, "--part=2/2").returncode == 0
    whole = run_command(*arguments)
    assert "reading: 100 % 4/4" in whole.stdout
    assert open_corpus(tmp_path / "workspace" / "base_data", "", checksums=True).train_rows > 200
    assert "fingerprint" in run_command(*arguments).stdout
    wrong = run_command(*arguments, "--dataset=a/b")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("nanochat: the rows have to come from one place — give either")
    assert len(source_rows(fat)) == 900

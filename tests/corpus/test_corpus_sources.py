"""Parquet files on the hub, in a folder and at an address: which are meant, and no byte more than wanted."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fat_corpus import COLUMNS, SILENT, shard_bytes, write_fat_corpus, write_rows
from hub_server import COMMIT, HubServer, hub_server
from nanochat.corpus import sources
from nanochat.corpus.preparation import complete
from nanochat.corpus.sampling import prepare_subset
from nanochat.corpus.sources import Source, SourceRequest, open_parquet, read_tables, source_from_json
from nanochat.errors import DataError, NanochatError, UsageError

NAME = "owner/fat"


@pytest.fixture(scope="module")
def fat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("root")
    write_fat_corpus(folder / NAME, files=2, rows=600, group=300, dimensions=256, words=60)
    return folder


@pytest.fixture
def hub(fat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("NANOCHAT_RETRY_SECONDS", "1")
    with hub_server(fat) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server


def subset(folder: Path, request: SourceRequest) -> Source:
    preparation = prepare_subset(
        folder, request, ratio=0.5, seed=3, columns=COLUMNS, rows_per_shard=100, validation_rows=20
    )
    complete(preparation, 1, SILENT)
    return preparation.source


def texts_of(folder: Path, place: Path) -> dict[str, Any]:
    """Make a corpus of all texts of a folder."""
    request = SourceRequest(place=str(place))
    preparation = prepare_subset(
        folder, request, ratio=1, seed=0, columns=("text",), rows_per_shard=100, validation_rows=2
    )
    return complete(preparation, 1, SILENT)


def test_a_link_to_a_file_is_read_and_one_to_nothing_is_missed(tmp_path: Path) -> None:
    write_rows(tmp_path / "elsewhere.parquet", pa.table({"text": [f"text {number}" for number in range(20)]}))
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.parquet").symlink_to(tmp_path / "elsewhere.parquet")
    assert texts_of(tmp_path / "corpus", tmp_path / "source")["details"]["rows_read"] == 20
    (tmp_path / "source" / "b.parquet").symlink_to(tmp_path / "nowhere.parquet")
    with pytest.raises(UsageError, match=r"b\.parquet is not there"):
        texts_of(tmp_path / "other", tmp_path / "source")


def wanted_bytes(folder: Path, columns: tuple[str, ...]) -> int:
    total = 0
    for path in folder.rglob("train-*.parquet"):
        metadata = pq.read_metadata(path)
        for group in range(metadata.num_row_groups):
            chunks = [metadata.row_group(group).column(index) for index in range(metadata.num_columns)]
            total += sum(chunk.total_compressed_size for chunk in chunks if chunk.path_in_schema in columns)
    return total


@pytest.fixture
def tiny_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests cost next to nothing, as in a file that is large."""
    monkeypatch.setattr(sources, "REQUEST_BYTES", 1)
    monkeypatch.setattr(sources, "TAIL_BYTES", 2**13)


@pytest.mark.usefixtures("tiny_requests")
def test_only_the_wanted_columns_come_from_the_hub_and_the_rows_are_those_of_a_copy(
    hub: HubServer, fat: Path, tmp_path: Path
) -> None:
    source = subset(tmp_path / "hub", SourceRequest(dataset=NAME))
    assert source.origin["revision"] == COMMIT
    wanted = wanted_bytes(fat / NAME, COLUMNS)
    size = sum(file.bytes for file in source.files)
    assert wanted < size / 3
    # The rest are two footers.
    assert wanted < hub.bytes_sent <= wanted + 2 * 2**13
    subset(tmp_path / "copy", SourceRequest(place=str(fat / NAME), split="train"))
    assert shard_bytes(tmp_path / "hub") == shard_bytes(tmp_path / "copy")


def test_a_file_comes_whole_and_verified_where_that_is_cheaper(hub: HubServer, fat: Path, tmp_path: Path) -> None:
    hub.flips = 1
    subset(tmp_path / "hub", SourceRequest(dataset=NAME))
    subset(tmp_path / "copy", SourceRequest(place=str(fat / NAME), split="train"))
    assert shard_bytes(tmp_path / "hub") == shard_bytes(tmp_path / "copy")


@pytest.mark.usefixtures("tiny_requests")
def test_an_address_is_read_column_by_column_too(fat: Path, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(fat / NAME / "data"), "/bucket/data", recursive=True)
    subset(tmp_path / "memory", SourceRequest(place="memory://bucket", split="train"))
    subset(tmp_path / "copy", SourceRequest(place=str(fat / NAME), split="train"))
    assert shard_bytes(tmp_path / "memory") == shard_bytes(tmp_path / "copy")
    memory.rm("/bucket", recursive=True)


def test_one_file_is_a_source(fat: Path) -> None:
    path = next((fat / NAME).rglob("train-00001*.parquet"))
    source = SourceRequest(place=str(path)).list()
    assert [file.name for file in source.files] == [path.name]
    assert source_from_json(source.as_json()) == source


def test_config_and_split_are_found_by_the_names_of_folders_and_files(fat: Path) -> None:
    place = str(fat / NAME)
    of = {split: SourceRequest(place=place, config="CC-A", split=split).list().files for split in ("train", "test")}
    assert [file.name.rpartition("/")[2] for file in of["test"]] == ["test-00000-of-00001.parquet"]
    assert len(of["train"]) == 2
    assert len(SourceRequest(place=place).list().files) == 3
    with pytest.raises(UsageError, match=r"no folder 'CC-B'.*--config: CC-A, data"):
        SourceRequest(place=place, config="CC-B").list()
    with pytest.raises(UsageError, match=r"no \.parquet files of the split 'validation'"):
        SourceRequest(place=place, split="validation").list()


@pytest.mark.parametrize(
    ("config", "split", "patterns"),
    [
        (None, "train", ["a/*.parquet"]),
        ("b", "train", ["b/x.parquet", "b/y.parquet"]),
        ("b", "test", ["b/z*"]),
    ],
)
def test_the_card_of_a_data_set_names_its_files(config: str | None, split: str, patterns: list[str]) -> None:
    configs = [
        {"config_name": "a", "default": True, "data_files": "a/*.parquet"},
        {
            "config_name": "b",
            "data_files": [
                {"split": "train", "path": ["b/x.parquet", "b/y.parquet"]},
                {"split": "test", "path": "b/z*"},
            ],
        },
    ]
    assert sources._card_patterns(configs, config, split, "o/n") == patterns
    assert sources._card_patterns([], config, split, "o/n") is None
    no_default = [{**entry, "default": False} for entry in configs]
    assert sources._card_patterns(no_default, None, "train", "o/n") == ["a/*.parquet", "b/x.parquet", "b/y.parquet"]
    with pytest.raises(UsageError, match="o/n has no config 'c' — choose one with --config: a, b"):
        sources._card_patterns(configs, "c", split, "o/n")
    with pytest.raises(UsageError, match="o/n has no split 'dev' — choose one with --split: train"):
        sources._card_patterns(configs, config, "dev", "o/n")


def test_a_huge_row_group_is_read_in_slices(fat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subset(tmp_path / "whole", SourceRequest(place=str(fat / NAME)))
    monkeypatch.setattr(sources, "LARGEST_GROUP_BYTES", 1000)
    monkeypatch.setattr(sources, "SLICE_ROWS", 64)
    source = SourceRequest(place=str(fat / NAME)).list()
    with open_parquet(source, source.files[-1], COLUMNS, tmp_path) as parquet:
        assert max(table.num_rows for table in read_tables(parquet, COLUMNS)) == 64
    subset(tmp_path / "slices", SourceRequest(place=str(fat / NAME)))
    assert shard_bytes(tmp_path / "slices") == shard_bytes(tmp_path / "whole")


def test_large_strings_become_strings(tmp_path: Path) -> None:
    texts = pa.array([f"text {number}" for number in range(40)], pa.large_string())
    write_rows(tmp_path / "s" / "a.parquet", pa.table({"text": texts}))
    assert texts_of(tmp_path / "c", tmp_path / "s")["schema"] == {"text": "string"}


def damage(place: Path, kind: str) -> None:
    path = place / "a.parquet"
    content = bytearray(path.read_bytes())
    if kind == "truncated":
        path.write_bytes(content[:-20])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "not parquet":
        path.write_bytes(b"text\n" * 100)
    else:
        content[len(content) // 3] ^= 255
        path.write_bytes(content)


@pytest.mark.parametrize("kind", ["truncated", "empty", "not parquet", "flipped"])
def test_a_damaged_file_is_one_line_that_names_it(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "s"
    place.mkdir()
    texts = [f"text {number} {number**5}" for number in range(4000)]
    pq.write_table(pa.table({"text": texts}), place / "a.parquet", write_page_checksum=True, use_dictionary=False)
    damage(place, kind)
    with pytest.raises(DataError, match=r"a\.parquet") as caught:
        texts_of(tmp_path / "c", place)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("place", "message"),
    [("nowhere", "holds no .parquet files|is not there"), ("nonsense://bucket", "cannot be opened")],
)
def test_a_place_that_is_none_is_one_line(tmp_path: Path, place: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        SourceRequest(place=place if "://" in place else str(tmp_path / place)).list()
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_parquet_is_named_itself(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no parquet")
    with pytest.raises(UsageError, match=r"notes\.txt holds no \.parquet files"):
        SourceRequest(place=str(tmp_path / "notes.txt")).list()


def test_texts_in_another_column_are_told_how_to_be_read(tmp_path: Path) -> None:
    pq.write_table(pa.table({"content": ["a text"]}), tmp_path / "a.parquet")
    source = SourceRequest(place=str(tmp_path)).list()
    with (
        pytest.raises(UsageError, match=r"no column 'text' \(it has: content\).*data local FOLDER --text-column"),
        open_parquet(source, source.files[0], ("text",), tmp_path / "scratch"),
    ):
        pass


def test_a_missing_column_is_told_with_those_that_are_there(fat: Path, tmp_path: Path) -> None:
    source = SourceRequest(place=str(fat / NAME)).list()
    with (
        pytest.raises(UsageError, match=r"no column 'url' \(it has: text, id, embedding.*choose others with --columns"),
        open_parquet(source, source.files[0], ("text", "url"), tmp_path),
    ):
        pass


def test_a_corpus_inside_its_own_source_is_refused(fat: Path) -> None:
    with pytest.raises(UsageError, match="would be read as part of its own source"):
        subset(fat / NAME / "mine", SourceRequest(place=str(fat / NAME)))


@pytest.mark.parametrize(("status", "message"), [(401, "HF_TOKEN"), (404, "check"), (429, "wait"), (503, "later")])
def test_a_hub_that_refuses_is_one_line_with_the_fix(hub: HubServer, status: int, message: str) -> None:
    hub.refuse_with = status
    with pytest.raises(NanochatError, match=message) as caught:
        SourceRequest(dataset=NAME).list()
    assert "\n" not in str(caught.value)


def test_a_hub_that_is_lost_half_way_loses_nothing_that_was_made(hub: HubServer, tmp_path: Path) -> None:
    hub.lose_after = 6
    with pytest.raises(NanochatError) as caught:
        subset(tmp_path / "c", SourceRequest(dataset=NAME))
    assert "\n" not in str(caught.value)
    hub.lose_after = None
    subset(tmp_path / "c", SourceRequest(dataset=NAME))
    assert shard_bytes(tmp_path / "c")

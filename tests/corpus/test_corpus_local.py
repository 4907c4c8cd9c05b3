import json
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanochat.corpus.local import LocalCounts, build_local_corpus, find_text_files, local_texts
from nanochat.corpus.shards import read_texts
from nanochat.errors import DataError, UsageError


def json_lines(texts: list[str], ascii_only: bool = True) -> bytes:
    return "".join(json.dumps({"text": text}, ensure_ascii=ascii_only) + "\n" for text in texts).encode()


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    folder = tmp_path / "mixed"
    (folder / "deep" / "deeper").mkdir(parents=True)
    (folder / ".git").mkdir()
    pq.write_table(pa.table({"text": ["p1", "p2"], "id": [1, 2]}), folder / "b.parquet")
    (folder / "a.jsonl").write_bytes(json_lines(["j1", "j2"]) + b"\n" + b'{"text": null}\n')
    (folder / "deep" / "c.jsonl.zst").write_bytes(
        zstandard.compress(json_lines(["z1"])) + zstandard.compress(json_lines(["z2"]))
    )
    (folder / "deep" / "deeper" / "d.txt").write_text("one\ntwo\n")
    (folder / "deep" / "picture.png").write_bytes(b"\x89PNG")
    (folder / ".git" / "hidden.txt").write_text("not a document")
    (folder / ".hidden.txt").write_text("not a document")
    return folder


def test_all_kinds_are_read_in_name_order_and_the_rest_is_counted(mixed: Path) -> None:
    counts = LocalCounts()
    texts = list(local_texts(mixed, counts=counts))
    assert texts == ["j1", "j2", "p1", "p2", "z1", "z2", "one\ntwo\n"]
    assert counts.files == {".jsonl": 1, ".parquet": 1, ".jsonl.zst": 1, ".txt": 1}
    assert counts.ignored_files == 2
    assert counts.null_rows == 1


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(), max_size=20), ascii_only=st.booleans())
def test_every_format_gives_back_the_same_texts(tmp_path: Path, texts: list[str], ascii_only: bool) -> None:
    lines = json_lines(texts, ascii_only)
    (tmp_path / "1.jsonl").write_bytes(lines)
    (tmp_path / "2.jsonl.zst").write_bytes(zstandard.compress(lines))
    pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), tmp_path / "3.parquet")
    assert list(local_texts(tmp_path)) == 3 * [text.replace("\r\n", "\n") for text in texts]


def test_windows_files_read_like_unix_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "three\\r\\nfour"}\r\n{"text": "five"}\r\n')
    assert list(local_texts(tmp_path)) == ["one\ntwo\n", "three\nfour", "five"]


def test_bytes_that_are_not_utf8_are_repaired_and_counted(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_bytes("Grüße".encode("latin-1"))
    (tmp_path / "in" / "b.txt").write_text("fine")
    manifest = build_local_corpus(tmp_path / "in", tmp_path / "out")
    assert manifest["invalid_texts_repaired"] == 1
    texts = [*read_texts(tmp_path / "out", "train", "fix"), *read_texts(tmp_path / "out", "val", "fix")]
    assert sorted(texts) == ["Gr\ufffd\ufffde", "fine"]


def test_another_column_can_hold_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "one"}\n')
    pq.write_table(pa.table({"body": ["two"]}), tmp_path / "b.parquet")
    assert list(local_texts(tmp_path, "body")) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "ok"}\n{"text": \n', r"a\.jsonl:2 is not JSON"),
        ("a.jsonl", b'{"text": "ok"}\n\n\xff\xfe\n', r"a\.jsonl:3 is not JSON"),
        ("a.jsonl", b"[1]\n", r"a\.jsonl:1 holds a list, not a JSON object"),
        ("a.jsonl", b'{"body": "x", "id": 1}\n', r"a\.jsonl:1 has no 'text' \(its keys: body, id\)"),
        ("a.jsonl", b'{"text": 3}\n', r"a\.jsonl:1: 'text' holds a int, not text"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1 is not JSON"),
        ("a.jsonl.zst", b"not zstd", r"a\.jsonl\.zst cannot be read"),
        ("a.jsonl.zst", zstandard.compress(json_lines(["x"] * 999))[:-9], r"a\.jsonl\.zst cannot be read"),
        ("a.parquet", b"PAR1", r"a\.parquet is damaged"),
    ],
)
def test_damaged_input_is_one_line_that_names_the_place(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        list(local_texts(tmp_path))
    assert "\n" not in str(caught.value)
    assert caught.value.fix


def test_a_missing_column_is_answered_with_the_columns_there_are(tmp_path: Path) -> None:
    pq.write_table(pa.table({"content": ["x"], "url": ["y"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"it has: content, url.*--text-column"):
        list(local_texts(tmp_path))


def test_a_folder_that_is_missing_or_holds_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a folder"):
        find_text_files(tmp_path / "nowhere")
    (tmp_path / "picture.png").write_bytes(b"")
    with pytest.raises(UsageError, match=r"no text that can be read \(1 other files\)"):
        find_text_files(tmp_path)


def test_links_to_files_are_followed_and_broken_ones_ignored(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text("linked")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").symlink_to(tmp_path / "blob")
    (tmp_path / "in" / "b.txt").symlink_to(tmp_path / "gone")
    (tmp_path / "in" / "circle").symlink_to(tmp_path / "in")
    assert list(local_texts(tmp_path / "in")) == ["linked"]


def test_a_corpus_inside_its_own_source_is_refused(mixed: Path) -> None:
    with pytest.raises(UsageError, match="its own source"):
        build_local_corpus(mixed, mixed / "base_data")


def test_the_same_files_give_the_same_corpus_anywhere_and_a_changed_file_is_noticed(
    tmp_path: Path, mixed: Path
) -> None:
    first = build_local_corpus(mixed, tmp_path / "one")
    moved = mixed.rename(tmp_path / "moved")
    assert build_local_corpus(moved, tmp_path / "two")["fingerprint"] == first["fingerprint"]
    assert build_local_corpus(moved, tmp_path / "one") == first
    (moved / "deep" / "deeper" / "d.txt").write_text("one\nTWO\n")
    with pytest.raises(UsageError, match="already holds another corpus"):
        build_local_corpus(moved, tmp_path / "one")


def test_files_and_rows_are_counted_in_the_manifest(tmp_path: Path, mixed: Path) -> None:
    details = build_local_corpus(mixed, tmp_path / "out")["details"]
    assert details == {
        "files": {".jsonl": 1, ".jsonl.zst": 1, ".parquet": 1, ".txt": 1},
        "ignored_files": 2,
        "null_rows": 1,
    }


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zst"])
def test_a_large_file_is_streamed(tmp_path: Path, suffix: str) -> None:
    lines = json_lines([f"{n} " + "word " * 2000 for n in range(3000)])
    (tmp_path / f"a{suffix}").write_bytes(zstandard.compress(lines) if suffix.endswith("zst") else lines)
    tracemalloc.start()
    assert sum(1 for _ in local_texts(tmp_path)) == 3000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(lines) > 30_000_000
    assert peak < 3_000_000


def test_names_in_any_order_on_disk_give_one_order(tmp_path: Path) -> None:
    for name in ["b", "a", "a-b", "a.b"]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text(name)
    (tmp_path / "b").rename(tmp_path / "0")
    assert list(local_texts(tmp_path)) == ["b", "a-b", "a.b", "a"]

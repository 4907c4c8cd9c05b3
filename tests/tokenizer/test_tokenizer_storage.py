"""A tokenizer on disk is whole, checked, plain data, and the same everywhere."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken.load import load_tiktoken_bpe

from nanochat.errors import DataError, ExitCode
from nanochat.files import file_entry, read_json, whole_folder, write_manifest
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer
from nanochat.tokenizer.tokenizer import parse_ranks

DATA_FILES = ["ranks.tiktoken", "config.json", "tokenizer.json"]


@pytest.fixture(scope="module")
def saved(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "tokenizer"
    tokenizer.save(folder)
    return folder


def test_a_loaded_tokenizer_is_the_one_that_was_saved(tokenizer: Tokenizer, saved: Path, hostile: list[str]) -> None:
    loaded = Tokenizer.load(saved)
    assert loaded.encode_batch(hostile) == tokenizer.encode_batch(hostile)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert (loaded.digit_group, loaded.corpus_fingerprint) == (2, "c0ffee")


def test_the_folder_holds_data_and_its_manifest_only(tokenizer: Tokenizer, saved: Path) -> None:
    assert {path.name for path in saved.iterdir()} == {*DATA_FILES, "manifest.json"}
    config = read_json(saved / "config.json")
    assert config["special_tokens"] == list(SPECIAL_TOKENS)
    assert config["vocab_size"] == tokenizer.vocab_size == 3000
    assert config["pattern"] == tokenizer.pattern
    assert read_json(saved / "manifest.json")["tokenizer_fingerprint"] == tokenizer.fingerprint


def test_saving_twice_writes_the_same_bytes(tokenizer: Tokenizer, saved: Path, tmp_path: Path) -> None:
    Tokenizer.load(saved).save(tmp_path / "again")
    assert all((tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes() for name in DATA_FILES)


def test_the_ranks_are_in_the_format_that_tiktoken_reads(
    tokenizer: Tokenizer, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    ranks = load_tiktoken_bpe(str(saved / "ranks.tiktoken"))
    assert ranks == {token: rank for rank, token in enumerate(tokenizer.mergeable_tokens)}


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(DATA_FILES), where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_one_flipped_bit_anywhere_is_found(saved: Path, name: str, where: float, bit: int) -> None:
    path = saved / name
    original = path.read_bytes()
    damaged = bytearray(original)
    damaged[int(where * len(original))] ^= 1 << bit
    path.write_bytes(damaged)
    try:
        with pytest.raises(DataError, match=rf"{name} .* — nanochat tokenizer train"):
            Tokenizer.load(saved)
    finally:
        path.write_bytes(original)


@pytest.mark.parametrize("name", [*DATA_FILES, "manifest.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_missing_or_truncated_file_is_named_with_the_command_that_mends_it(
    saved: Path, tmp_path: Path, name: str, damage: str
) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(saved, folder)
    path = folder / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError) as caught:
        Tokenizer.load(folder)
    assert name in caught.value.what
    assert caught.value.fix == "nanochat tokenizer train"
    assert caught.value.exit_code == ExitCode.DATA_DAMAGED


def test_a_workspace_without_a_tokenizer_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"missing — nanochat tokenizer train"):
        Tokenizer.load(tmp_path / "tokenizer")


def test_another_format_is_refused_and_not_guessed_at(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(saved, folder)
    write_manifest(folder, "tokenizer", read_json(folder / "manifest.json")["files"], schema=99)
    with pytest.raises(DataError, match="format 99"):
        Tokenizer.load(folder)


def test_ranks_that_were_edited_along_with_their_checksum_are_still_refused(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(saved, folder)
    lines = (folder / "ranks.tiktoken").read_text().splitlines(keepends=True)
    (folder / "ranks.tiktoken").write_text("".join([*lines[:300], *lines[301:]]))
    files = [file_entry(folder / name) for name in DATA_FILES]
    write_manifest(folder, "tokenizer", files, schema=1)
    with pytest.raises(DataError, match=r"ranks\.tiktoken is damaged \(line 301 "):
        Tokenizer.load(folder)


def test_saving_over_an_old_tokenizer_replaces_all_of_it_and_leaves_nothing_beside(
    tokenizer: Tokenizer, bytes_only: Tokenizer, tmp_path: Path
) -> None:
    folder = tmp_path / "tokenizer"
    tokenizer.save(folder)
    (folder / "note_of_the_old_one").touch()
    bytes_only.save(folder)
    assert Tokenizer.load(folder).fingerprint == bytes_only.fingerprint
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]
    assert not (folder / "note_of_the_old_one").exists()


def test_saving_through_a_link_replaces_what_it_points_at(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "tokenizer").symlink_to("scratch")
    tokenizer.save(tmp_path / "tokenizer")
    assert (tmp_path / "tokenizer").is_symlink()
    assert Tokenizer.load(tmp_path / "scratch").fingerprint == tokenizer.fingerprint


def test_a_disk_that_fills_up_while_saving_leaves_the_old_tokenizer_untouched(
    bytes_only: Tokenizer, saved: Path, tmp_path: Path
) -> None:
    bytes_only.save(tmp_path / "tokenizer")
    script = (
        "import resource, sys; from pathlib import Path; from nanochat.tokenizer import Tokenizer;"
        "tokenizer = Tokenizer.load(Path(sys.argv[1]));"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000));"
        "tokenizer.save(Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", script, str(saved), str(tmp_path / "tokenizer")]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert "File too large" in ended.stderr
    assert Tokenizer.load(tmp_path / "tokenizer").fingerprint == bytes_only.fingerprint
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]


def test_an_interrupted_writer_leaves_no_half_made_folder(tmp_path: Path) -> None:
    def interrupted() -> None:
        with whole_folder(tmp_path / "made") as folder:
            (folder / "first").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content", [b"YQ== 0\nYg== 2\n", b"YQ==\n", b"Y! 0\n", b"YQ== zero\n", b"YQ== 0\n\nYg== 1\n", b" 0\n"]
)
def test_ranks_that_are_not_one_token_a_line_in_order_are_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"line \d"):
        parse_ranks(content)


def test_the_fingerprint_tells_any_two_tokenizers_apart() -> None:
    every_byte = [bytes([value]) for value in range(256)]
    tokenizers = [
        Tokenizer([*every_byte, b"ab", b"cd"], r"\w+|\W+", digit_group=2),
        Tokenizer([*every_byte, b"cd", b"ab"], r"\w+|\W+", digit_group=2),
        Tokenizer([*every_byte, b"ab"], r"\w+|\W+", digit_group=2),
        Tokenizer([*every_byte, b"ab", b"cd"], r"\w+|\W", digit_group=2),
    ]
    assert len({tokenizer.fingerprint for tokenizer in tokenizers}) == 4


def test_the_fingerprint_does_not_depend_on_who_trained_it_on_what() -> None:
    every_byte = [bytes([value]) for value in range(256)]
    named = Tokenizer(every_byte, r"\w+|\W+", digit_group=2, corpus_fingerprint="0123")
    assert named.fingerprint == Tokenizer(every_byte, r"\w+|\W+", digit_group=2).fingerprint

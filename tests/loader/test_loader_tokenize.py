import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from nanochat.corpus.shards import read_texts, write_corpus
from nanochat.errors import DataError, NanochatError, UsageError
from nanochat.files import read_json, write_json
from nanochat.loader.token_shards import TokenDataset
from nanochat.loader.tokenize import TokenizeProgress, tokenize_corpus
from nanochat.tokenizer.tokenizer import Tokenizer
from nanochat.tokenizer.train import train_tokenizer


def texts(count: int = 90, salt: str = "") -> list[str]:
    return [f"{salt}Document {i} says {'na ' * (i % 17)}chat, naïvely: <|bos|> is {i * i}.\n" for i in range(count)]


def make_corpus(folder: Path, documents: list[str], rows_per_shard: int = 20) -> Path:
    source = {"name": "test", "documents": len(documents), "first": documents[0]}
    write_corpus(folder, documents, rows_per_shard=rows_per_shard, source=source, validation_rows=5)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus") / "base_data", texts())


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    train_tokenizer(texts(), vocab_size=280, max_chars=10**6).save(folder)
    return folder


@pytest.fixture(scope="module")
def finished(corpus: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an undisturbed run makes, to compare with."""
    out = tmp_path_factory.mktemp("finished") / "tokens"
    tokenize_corpus(corpus, tokenizer, out, workers=1, progress=silent)
    return out


def silent(_: TokenizeProgress) -> None:
    pass


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the manifest, which also holds the command that wrote it."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}


def fingerprint(folder: Path) -> str:
    value: str = read_json(folder / "manifest.json")["fingerprint"]
    return value


def interrupt(_: TokenizeProgress) -> None:
    raise KeyboardInterrupt


def test_every_document_is_its_text_after_bos_in_the_corpus_order(
    corpus: Path, tokenizer: Path, finished: Path
) -> None:
    encoder = Tokenizer.load(tokenizer)
    for split in ("train", "val"):
        dataset = TokenDataset.open(finished, split, checksums=True)
        expected = list(read_texts(corpus, split, "fix"))
        assert dataset.num_documents == len(expected)
        for index, text in enumerate(expected):
            bos, *ids = dataset.document(index).tolist()
            assert bos == encoder.bos_id not in ids
            assert encoder.decode(ids) == text
        totals = read_json(finished / "manifest.json")["totals"][split]
        assert totals["text_bytes"] == sum(len(text.encode()) for text in expected)
        assert totals["tokens"] == dataset.num_tokens
        assert totals["documents"] == dataset.num_documents


def test_the_result_does_not_depend_on_the_number_of_workers(
    corpus: Path, tokenizer: Path, finished: Path, tmp_path: Path
) -> None:
    manifest = tokenize_corpus(corpus, tokenizer, tmp_path, workers=2, progress=silent)
    assert contents(tmp_path) == contents(finished)
    assert manifest["fingerprint"] == fingerprint(finished)


def test_without_fastokens_the_shards_are_the_same_bytes(
    corpus: Path, tokenizer: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fastokens", None)
    tokenize_corpus(corpus, tokenizer, tmp_path, workers=1, progress=silent)
    assert contents(tmp_path) == contents(finished)


def test_a_run_stopped_after_any_shard_goes_on_without_redoing_that_shard(
    corpus: Path, tokenizer: Path, finished: Path, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        tokenize_corpus(corpus, tokenizer, tmp_path, workers=1, progress=interrupt)
    assert not (tmp_path / "manifest.json").exists()
    with pytest.raises(DataError, match="nanochat data tokenize"):
        TokenDataset.open(tmp_path, "train")
    done = tmp_path / "train_00000.tokens.npy"
    inode = done.stat().st_ino
    tokenize_corpus(corpus, tokenizer, tmp_path, workers=1, progress=silent)
    assert contents(tmp_path) == contents(finished)
    assert done.stat().st_ino == inode


KILLED_RUN = """
import sys
from pathlib import Path
from nanochat.loader.tokenize import tokenize_corpus
if __name__ == "__main__":
    corpus, tokenizer, out = map(Path, sys.argv[1:])
    tokenize_corpus(corpus, tokenizer, out, workers=1)
"""


@pytest.mark.parametrize("moment", [0, 1, 3, 6])
def test_a_run_killed_at_any_moment_is_completed_by_the_same_command(
    corpus: Path, tokenizer: Path, finished: Path, tmp_path: Path, moment: int
) -> None:
    out = tmp_path / "tokens"
    script = tmp_path / "run.py"
    script.write_text(KILLED_RUN)
    process = subprocess.Popen(
        [sys.executable, script, corpus, tokenizer, out], stderr=subprocess.DEVNULL, start_new_session=True
    )
    while process.poll() is None and (not out.exists() or len(list(out.iterdir())) < moment):
        time.sleep(0.0005)
    os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
    process.wait()
    tokenize_corpus(corpus, tokenizer, out, workers=1, progress=silent)
    assert contents(out) == contents(finished)
    assert fingerprint(out) == fingerprint(finished)


@pytest.mark.parametrize("suffix", ["tokens.npy", "offsets.npy", "receipt.json"])
def test_a_damaged_shard_is_made_again_and_the_others_are_left(
    corpus: Path, tokenizer: Path, finished: Path, tmp_path: Path, suffix: str
) -> None:
    tokenize_corpus(corpus, tokenizer, tmp_path, workers=1, progress=silent)
    damaged = tmp_path / f"train_00001.{suffix}"
    damaged.write_bytes(damaged.read_bytes()[:-2] + b"!!")
    untouched = tmp_path / "train_00002.tokens.npy"
    inode = untouched.stat().st_ino
    tokenize_corpus(corpus, tokenizer, tmp_path, workers=1, progress=silent)
    assert contents(tmp_path) == contents(finished)
    assert untouched.stat().st_ino == inode


def test_tokens_of_another_tokenizer_or_corpus_are_replaced(
    corpus: Path, tokenizer: Path, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "tokens"
    other_tokenizer = tmp_path / "tokenizer"
    train_tokenizer(texts(salt="zebra "), vocab_size=270, max_chars=10**6).save(other_tokenizer)
    other_corpus = make_corpus(tmp_path / "base_data", texts(200, "Another. "))
    tokenize_corpus(other_corpus, other_tokenizer, out, workers=1, progress=silent)
    (out / "notes.txt").write_text("mine")
    # Stopped in the middle of the change, the folder must not pass for either.
    with pytest.raises(KeyboardInterrupt):
        tokenize_corpus(corpus, tokenizer, out, workers=1, progress=interrupt)
    assert not (out / "manifest.json").exists()
    tokenize_corpus(corpus, tokenizer, out, workers=1, progress=silent)
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    assert contents(out) == contents(finished)


def test_a_grown_corpus_costs_only_its_new_shards(tokenizer: Path, tmp_path: Path) -> None:
    out = tmp_path / "tokens"
    small = make_corpus(tmp_path / "small", texts(90), rows_per_shard=20)
    tokenize_corpus(small, tokenizer, out, workers=1, progress=silent)
    before = {path.name: path.stat().st_ino for path in out.iterdir()}
    grown = make_corpus(tmp_path / "grown", texts(90), rows_per_shard=10)
    tokenize_corpus(grown, tokenizer, out, workers=1, progress=silent)
    same = "val_00000.tokens.npy"
    assert (out / same).stat().st_ino == before[same]
    assert TokenDataset.open(out, "train").num_documents == 85


def test_a_killed_worker_is_one_clear_error_and_the_same_command_recovers(tokenizer: Path, tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "base_data", texts(400), rows_per_shard=8)

    def kill_workers(_: TokenizeProgress) -> None:
        for child in multiprocessing.active_children():
            os.kill(child.pid or 0, signal.SIGKILL)

    out = tmp_path / "tokens"
    with pytest.raises(NanochatError, match=r"was killed.*fewer --workers"):
        tokenize_corpus(corpus, tokenizer, out, workers=2, progress=kill_workers)
    tokenize_corpus(corpus, tokenizer, out, workers=1, progress=silent)
    assert TokenDataset.open(out, "train", checksums=True).num_documents == 395


@pytest.fixture
def damaged_corpus(tmp_path: Path) -> Path:
    folder = make_corpus(tmp_path / "base_data", texts())
    shard = folder / "shard_00001.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 255
    shard.write_bytes(content)
    return folder


@pytest.mark.parametrize("workers", [1, 2])
def test_a_changed_text_shard_is_named_wherever_it_is_read(
    damaged_corpus: Path, tokenizer: Path, tmp_path: Path, workers: int
) -> None:
    with pytest.raises(DataError, match=r"shard_00001\.parquet.* — "):
        tokenize_corpus(damaged_corpus, tokenizer, tmp_path / "out", workers=workers, progress=silent)


def test_no_workers_are_refused(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--workers"):
        tokenize_corpus(corpus, tokenizer, tmp_path, workers=0)


def test_progress_is_told_per_shard(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    seen: list[TokenizeProgress] = []
    manifest = tokenize_corpus(corpus, tokenizer, tmp_path, workers=1, progress=seen.append)
    assert [progress.shards_done for progress in seen] == list(range(1, len(seen) + 1))
    assert seen[-1].shards_done == seen[-1].num_shards == 6
    assert seen[-1].tokens_done == sum(split["tokens"] for split in manifest["totals"].values())


def test_shards_are_little_endian_uint16_that_any_numpy_reads(finished: Path) -> None:
    tokens = np.load(finished / "train_00000.tokens.npy")
    offsets = np.load(finished / "train_00000.offsets.npy")
    assert (tokens.dtype.str, offsets.dtype.str) == ("<u2", "<i8")
    assert len(tokens) == offsets[-1]


def test_tokens_that_a_run_reads_are_not_rewritten(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    out = tmp_path / "tokens"
    tokenize_corpus(corpus, tokenizer, out, workers=1)
    before = contents(out)
    about = {"what": "the training of d12", "host": "elsewhere", "pid": 1, "job": "7"}
    lease = out / ".use-elsewhere-1-0"
    write_json(lease, about)
    with pytest.raises(UsageError, match=r"is in use by the training of d12 \(host elsewhere, process 1, job 7"):
        tokenize_corpus(make_corpus(tmp_path / "other", texts(salt="other ")), tokenizer, out, workers=1)
    lease.unlink()
    assert contents(out) == before

"""What is in a folder, whether it is whole, and how it gets elsewhere."""

import os
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pyarrow as pa
import pytest

from fat_corpus import SILENT, write_fat_corpus, write_rows
from nanochat.corpus.inspection import inspect, length_histogram, transfer_commands, verify
from nanochat.corpus.shards import write_corpus
from nanochat.errors import DataError, UsageError
from nanochat.files import use_folders
from nanochat.workspace import Workspace

Command = Callable[..., CompletedProcess[str]]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    texts = [f"document {number} " * (1 + number % 9) for number in range(200)]
    write_corpus(tmp_path / "corpus", texts, rows_per_shard=40, source={"name": "test"}, validation_rows=10)
    return tmp_path / "corpus"


def test_a_folder_of_anyone_is_described(tmp_path: Path) -> None:
    found = inspect(write_fat_corpus(tmp_path, files=2, rows=100, group=10), num_samples=2)
    assert found.rows == {
        "data/CC-A/test-00000-of-00001.parquet": 10,
        "data/CC-A/train-00000-of-00002.parquet": 100,
        "data/CC-A/train-00001-of-00002.parquet": 100,
    }
    assert list(found.groups.values()) == [1, 10, 10]
    assert found.tokens is not None
    assert found.tokens > 210
    assert found.manifest is None
    assert len(found.samples) == 2
    assert len(found.characters) == 210 - 5


def test_the_histogram_counts_every_length_once() -> None:
    assert length_histogram(np.array([1, 2, 3, 4, 7, 8, 1000])) == [
        (1, 1),
        (2, 2),
        (4, 2),
        (8, 1),
        (16, 0),
        (32, 0),
        (64, 0),
        (128, 0),
        (256, 0),
        (512, 1),
    ]
    assert length_histogram(np.array([], np.int64)) == []
    assert length_histogram(np.array([600])) == [(512, 1)]


def test_the_command_tells_all_of_it_and_warns_of_few_row_groups(corpus: Path, run_command: Command) -> None:
    with use_folders("a run", corpus):
        told = run_command("data", "inspect", str(corpus), "--samples=1")
    assert told.returncode == 0
    assert "6 files, 200 rows" in told.stdout
    assert "source name=test" in told.stdout
    assert "in use by a run (host" in told.stdout
    assert told.stdout.count("sample: 'document") == 1
    assert "have less than 8 row groups" in told.stderr


def test_what_is_no_text_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no \.parquet files"):
        inspect(tmp_path)
    write_rows(tmp_path / "a.parquet", pa.table({"body": ["a"]}))
    with pytest.raises(DataError, match=r"a\.parquet is damaged or no text"):
        inspect(tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nonsense PAR1")
    with pytest.raises(DataError, match=r"a\.parquet is damaged or no text"):
        inspect(tmp_path)


def test_every_damaged_file_is_named_with_what_mends_it(corpus: Path, run_command: Command) -> None:
    whole = run_command("data", "verify", str(corpus))
    assert whole.returncode == 0
    assert "all 6 files are whole" in whole.stdout
    (corpus / "shard_00001.parquet").unlink()
    os.truncate(corpus / "shard_00002.parquet", 100)
    content = bytearray((corpus / "shard_00003.parquet").read_bytes())
    content[50] ^= 1
    (corpus / "shard_00003.parquet").write_bytes(content)
    told = run_command("data", "verify", str(corpus))
    assert told.returncode == 4
    assert "shard_00001.parquet is missing" in told.stdout
    assert "shard_00002.parquet has 100 bytes" in told.stdout
    assert "shard_00003.parquet does not match its checksum" in told.stdout
    assert told.stderr.count("\n") == 1
    assert "3 of 6 files" in told.stderr
    assert f"rm -r {corpus} && nanochat" in told.stderr


def test_a_folder_of_any_kind_can_be_verified(prepared_workspace: Workspace) -> None:
    for folder in (prepared_workspace.base_data, prepared_workspace.tokens, prepared_workspace.tokenizer):
        assert verify(folder, 2, SILENT)[1] == {}


@pytest.mark.parametrize("content", [None, "{", "[]", '{"kind": "corpus"}'])
def test_without_a_good_manifest_nothing_can_be_said(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(DataError, match="make or copy the folder again"):
        verify(tmp_path, 1, SILENT)


@pytest.mark.parametrize("target", ["folder", ":path", "host:", "-e evil:path", "/a/b:c", ""])
def test_a_target_that_is_no_folder_of_a_host_is_refused(corpus: Path, target: str) -> None:
    with pytest.raises(UsageError, match="does not name a folder on another host"):
        transfer_commands(corpus, target)


def test_a_folder_without_manifest_is_not_sent(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"manifest\.json is missing"):
        transfer_commands(tmp_path, "host:/there")


@pytest.mark.skipif(shutil.which("rsync") is None, reason="rsync is not installed")
@pytest.mark.parametrize("name", ["there", "with a space", "it's $HOME; `ls`"])
def test_the_printed_commands_bring_the_folder_over(corpus: Path, tmp_path: Path, name: str) -> None:
    shell = tmp_path / "ssh"
    shell.write_text('#!/bin/sh\nshift\nexec sh -c "$*"\n')
    shell.chmod(0o755)
    there = tmp_path / "host" / name
    there.parent.mkdir()
    (corpus / ".lock").touch()
    commands = transfer_commands(corpus, f"host:{there}")
    environment = {**os.environ, "RSYNC_RSH": str(shell)}
    for command in commands[:-1]:
        subprocess.run(command, shell=True, check=True, env=environment, capture_output=True)
    assert verify(there, 1, SILENT)[1] == {}
    assert sorted(path.name for path in there.iterdir()) == sorted(
        path.name for path in corpus.iterdir() if path.name != ".lock"
    )
    assert shlex.split(shlex.split(commands[-1])[2]) == ["nanochat", "data", "verify", str(there)]

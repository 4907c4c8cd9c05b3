"""`nanochat data download` brings whole shards of the standard sets, keeps what is whole, and adds more later."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hub_server import COMMIT, HubServer, hub_server
from nanochat.corpus.download import STANDARD_SETS, parse_shards
from nanochat.corpus.shards import open_corpus
from nanochat.errors import ExitCode, UsageError
from nanochat.tasks.inventory import check_inventory
from nanochat.workspace import Workspace

Result = subprocess.CompletedProcess[str]
CLIMBMIX = STANDARD_SETS["climbmix"]
LAST = CLIMBMIX.num_shards - 1


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    root = tmp_path / "hub"
    folder = root / CLIMBMIX.repository
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("# ClimbMix\n")
    for index in (0, 1, 2, LAST):
        texts = [f"document {index}.{row}" for row in range(50)]
        pq.write_table(pa.table({"text": texts}), folder / f"shard_{index:05d}.parquet")
    with hub_server(root) as server:
        yield server


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "workspace")


@pytest.fixture
def download(
    hub: HubServer, workspace: Workspace, run_command: Callable[..., Result], tmp_path: Path
) -> Callable[..., Result]:
    def run(*arguments: str, **environment: str) -> Result:
        about = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": "", **environment}
        return run_command("data", "download", *arguments, workspace=workspace.root, **about)

    return run


def shards(workspace: Workspace) -> list[str]:
    return sorted(path.name for path in workspace.base_data.iterdir() if path.name not in (".lock", "manifest.json"))


def test_the_shards_asked_for_come_with_the_validation_shard_and_a_manifest(
    download: Callable[..., Result], workspace: Workspace
) -> None:
    result = download("climbmix", "--shards", "0-1")
    assert result.returncode == 0, result.stderr
    assert "train: 100 documents" in result.stdout
    corpus = open_corpus(workspace.base_data, "", checksums=True)
    assert [path.name for path in corpus.val_shards] == [f"shard_{LAST:05d}.parquet"]
    assert corpus.manifest["source"] == {
        "name": "climbmix",
        "dataset": CLIMBMIX.repository,
        "revision": COMMIT,
        "shards": [0, 1, LAST],
    }


def test_what_is_there_is_kept_and_more_is_added(
    download: Callable[..., Result], workspace: Workspace, hub: HubServer
) -> None:
    assert download("climbmix", "--shards", "0").returncode == 0
    hub.requests.clear()
    assert download("climbmix", "--shards", "0").returncode == 0
    assert hub.requests == []
    assert download("climbmix", "--shards", "1-2").returncode == 0
    assert sorted(line for line in hub.requests if "/resolve/" in line) == [
        f"GET /datasets/{CLIMBMIX.repository}/resolve/{COMMIT}/shard_0000{index}.parquet" for index in (1, 2)
    ]
    assert open_corpus(workspace.base_data, "").train_rows == 150


def test_a_lost_connection_keeps_whole_shards_and_the_next_attempt_brings_the_rest(
    download: Callable[..., Result], workspace: Workspace, hub: HubServer
) -> None:
    hub.lose_after = 3
    result = download("climbmix", "--shards", "0-2", "--workers", "1", NANOCHAT_RETRY_SECONDS="1")
    assert result.returncode == ExitCode.FAILED
    assert f"{CLIMBMIX.repository}/shard_00002.parquet was not downloaded: " in result.stderr.splitlines()[-1]
    assert shards(workspace) == ["shard_00000.parquet", "shard_00001.parquet"]
    hub.lose_after = None
    hub.requests.clear()
    assert download("climbmix", "--shards", "0-2").returncode == 0
    assert sum("/resolve/" in line for line in hub.requests) == 2


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-9])])
def test_a_shard_that_was_lost_or_cut_comes_again(
    download: Callable[..., Result], workspace: Workspace, damage: Callable[[Path], None]
) -> None:
    assert download("climbmix", "--shards", "0-1").returncode == 0
    damage(workspace.base_data / "shard_00001.parquet")
    assert download("climbmix", "--shards", "0-1").returncode == 0
    open_corpus(workspace.base_data, "", checksums=True)


def test_a_flipped_byte_that_lies_there_is_replaced_before_the_manifest_is_written(
    download: Callable[..., Result], workspace: Workspace, hub: HubServer
) -> None:
    workspace.base_data.mkdir(parents=True)
    content = (hub.root / CLIMBMIX.repository / "shard_00000.parquet").read_bytes()
    (workspace.base_data / "shard_00000.parquet").write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    assert download("climbmix", "--shards", "0").returncode == 0
    assert (workspace.base_data / "shard_00000.parquet").read_bytes() == content


def test_another_corpus_is_not_touched(download: Callable[..., Result], workspace: Workspace, hub: HubServer) -> None:
    assert download("climbmix", "--shards", "0").returncode == 0
    shutil.move(hub.root / CLIMBMIX.repository, hub.root / STANDARD_SETS["fineweb-edu"].repository)
    result = download("fineweb-edu", "--shards", "0")
    assert result.returncode == ExitCode.USAGE
    assert "already holds another corpus" in result.stderr
    assert shards(workspace) == ["shard_00000.parquet", f"shard_{LAST:05d}.parquet"]


def test_staged_text_is_in_the_inventory(
    hub: HubServer, workspace: Workspace, run_command: Callable[..., Result], tmp_path: Path
) -> None:
    arguments = ("stage", "--stages", "corpus", "--pretraining", "climbmix", "--shards", "0-1")
    result = run_command(*arguments, workspace=workspace.root, HF_ENDPOINT=hub.endpoint, HF_TOKEN="")
    assert result.returncode == 0, result.stderr
    assert check_inventory(workspace.inventory, checksums=True) == []
    (workspace.base_data / "shard_00000.parquet").unlink()
    (missing,) = check_inventory(workspace.inventory)
    assert "shard_00000.parquet is missing — nanochat data download climbmix --shards 0-1" in str(missing)


def test_a_refusal_leaves_no_folder(download: Callable[..., Result], workspace: Workspace, hub: HubServer) -> None:
    hub.refuse_with = 404
    result = download("climbmix", "--shards", "0")
    (line,) = result.stderr.splitlines()
    assert "the server answered 404 — check HF_ENDPOINT, the name and --revision" in line
    assert not workspace.base_data.exists()


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.endurance)])
def test_killed_again_and_again_it_ends_with_the_same_bytes(
    workspace: Workspace, hub: HubServer, tmp_path: Path, kills: int
) -> None:
    folder = hub.root / CLIMBMIX.repository
    numbers = np.random.default_rng(0)
    for index in (0, 1):
        texts = [numbers.bytes(1000).hex() for _ in range(1000)]
        pq.write_table(pa.table({"text": texts}), folder / f"shard_{index:05d}.parquet")
    environment = {**os.environ, "NANOCHAT_BASE_DIR": str(workspace.root), "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": ""}
    command = [sys.executable, "-m", "nanochat", "data", "download", "climbmix", "--shards", "0-1"]
    for kill in range(kills + 1):
        hub.pause = 0.05 if kill < kills else 0.0
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        if kill < kills:
            sent = hub.bytes_sent
            while hub.bytes_sent == sent and process.poll() is None:
                time.sleep(0.01)
            time.sleep(float(numbers.uniform(0, 0.3)))
            process.kill()
        assert process.wait() in ((0, -signal.SIGKILL) if kill < kills else (0,))
    for path in open_corpus(workspace.base_data, "", checksums=True).train_shards:
        assert path.read_bytes() == (folder / path.name).read_bytes()
    assert shards(workspace) == ["shard_00000.parquet", "shard_00001.parquet", f"shard_{LAST:05d}.parquet"]


@pytest.mark.parametrize("text", ["3-1", "-1", "0-9", "a", "8-8", "1,2"])
def test_a_range_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"is not a range of training shards — give FIRST-LAST of 0-7; .*, 8, "):
        parse_shards(text, 9)


def test_ranges_hold_both_ends_and_default_to_all() -> None:
    assert list(parse_shards("2-4", 9)) == [2, 3, 4]
    assert list(parse_shards("7", 9)) == [7]
    assert list(parse_shards("", 9)) == list(range(8))

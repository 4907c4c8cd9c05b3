"""Corpora in the making, killed again and again. Some minutes on two cores: `nox -s endurance`."""

import random
import shutil
import time
from pathlib import Path

import pytest

from azurite import azurite
from fat_corpus import run_killed, shard_bytes, write_fat_corpus

KILLS = 50
LAYOUT = ("--rows-per-shard=400", "--validation-rows=100")


@pytest.mark.endurance
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "command", [("subset", "--ratio=0.4"), ("rank", "--by=score", "--top=0.3"), ("rank", "--by=score", "--sort")]
)
def test_fifty_kills_end_in_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    fat = write_fat_corpus(tmp_path / "fat", files=8, rows=2000, words=200)
    kill_fifty_times(tmp_path, monkeypatch, ["data", *command, f"--source={fat}", *LAYOUT])


@pytest.mark.endurance
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("mode", ["stream", "bulk"])
def test_fifty_kills_of_a_transfer_from_azure_end_in_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    fat = write_fat_corpus(tmp_path / "fat", files=6, rows=2000, words=200, dimensions=1024)
    blobs = {path.name: path.read_bytes() for path in fat.rglob("*.parquet")}
    with azurite(tmp_path / "azurite") as store:
        store.upload("corpora", dict(list(blobs.items())[::2]))
        # Without an MD5 of the whole.
        store.upload("corpora", dict(list(blobs.items())[1::2]), pieces=2**20)
        for name, value in store.environment(AZURE_STORAGE_KEY=store.key).items():
            monkeypatch.setenv(name, value)
        arguments = ["data", "azure", "--container=corpora", f"--mode={mode}", "--columns=text,id,token_count", *LAYOUT]
        kill_fifty_times(tmp_path, monkeypatch, arguments)


def kill_fifty_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    """Kill a command that makes base_data at random moments; whenever it ends, it has made the same shards."""

    def run(name: str, workers: int, delay: float | None = None) -> int:
        monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / name))
        return run_killed([*arguments, f"--workers={workers}"], delay)

    began = time.monotonic()
    assert run("whole", 1) == 0
    whole_seconds = time.monotonic() - began
    whole = shard_bytes(tmp_path / "whole" / "base_data")
    chance = random.Random(9)
    killed = 0
    while killed < KILLS:
        if run("killed", chance.choice([1, 2]), chance.uniform(0, min(2.0, whole_seconds))) != 0:
            killed += 1
            continue
        assert shard_bytes(tmp_path / "killed" / "base_data") == whole
        # Done, it begins anew, so that every kill meets work.
        shutil.rmtree(tmp_path / "killed")
    assert run("killed", 2) == 0
    assert shard_bytes(tmp_path / "killed" / "base_data") == whole

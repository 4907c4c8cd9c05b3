"""Corpora in the making, killed again and again. Some minutes on two cores: `nox -s endurance`."""

import random
import time
from pathlib import Path

import pytest

from fat_corpus import run_killed, shard_bytes, write_fat_corpus

KILLS = 50


@pytest.mark.endurance
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "command", [("subset", "--ratio=0.4"), ("rank", "--by=score", "--top=0.3"), ("rank", "--by=score", "--sort")]
)
def test_fifty_kills_end_in_the_same_bytes(tmp_path: Path, command: tuple[str, ...]) -> None:
    fat = write_fat_corpus(tmp_path / "fat", files=8, rows=2000, words=200)
    arguments = ["data", *command, f"--source={fat}", "--rows-per-shard=400", "--validation-rows=100"]
    began = time.monotonic()
    assert run_killed([*arguments, "--workers=1", f"--output={tmp_path / 'whole'}"], None) == 0
    whole_seconds = time.monotonic() - began
    chance = random.Random(9)
    killed = finished = 0
    while killed < KILLS:
        workers = chance.choice([1, 2])
        # Once it is done it begins anew in another folder, so that every kill meets work.
        folder = tmp_path / f"killed-{finished}"
        delay = chance.uniform(0, min(2.0, whole_seconds))
        if run_killed([*arguments, f"--workers={workers}", f"--output={folder}"], delay) != 0:
            killed += 1
        else:
            finished += 1
            assert shard_bytes(folder) == shard_bytes(tmp_path / "whole")
    assert run_killed([*arguments, f"--output={tmp_path / f'killed-{finished}'}"], None) == 0
    assert shard_bytes(tmp_path / f"killed-{finished}") == shard_bytes(tmp_path / "whole")

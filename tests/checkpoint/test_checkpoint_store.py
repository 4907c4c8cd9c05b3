"""A checkpoint is whole, verified and kept; whatever happens while one is written, the one before it loads."""

import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nanochat.checkpoint.folders import checkpoint_folder, list_steps
from nanochat.checkpoint.store import (
    CheckpointNotSavedError,
    load_checkpoint,
    load_newest,
    save_checkpoint,
)
from nanochat.errors import DataError

FIX = "train again"
FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "config.json", "manifest.json"]


def save(parent: Path, step: int, keep: int = 2, size: int = 1000) -> str:
    generator = torch.Generator().manual_seed(step)
    weights = torch.randn(size, generator=generator)
    return save_checkpoint(
        parent,
        step,
        # Views that share memory, as parameters in an optimizer's bank do.
        model={"a": weights[: size // 2], "b": weights[size // 2 :]},
        optimizer={"a.exp_avg": weights * 2},
        state={"progress": {"step": step}},
        config={"identity": {"seed": 1}},
        keep=keep,
    )


def test_what_was_saved_is_what_is_loaded(tmp_path: Path) -> None:
    fingerprint = save(tmp_path, 7)
    loaded = load_checkpoint(tmp_path, 7, FIX)
    weights = torch.randn(1000, generator=torch.Generator().manual_seed(7))
    assert torch.equal(loaded.model["a"], weights[:500])
    assert torch.equal(loaded.model["b"], weights[500:])
    assert torch.equal(loaded.optimizer["a.exp_avg"], weights * 2)
    assert loaded.state == {"step": 7, "progress": {"step": 7}}
    assert loaded.config == {"identity": {"seed": 1}}
    assert (loaded.step, loaded.fingerprint) == (7, fingerprint)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 30, 400, 1_000_000):
        save(tmp_path, step, keep=3)
    assert list_steps(tmp_path) == [30, 400, 1_000_000]
    assert sorted(folder.name for folder in tmp_path.iterdir()) == [
        "step_000030",
        "step_000400",
        "step_1000000",
    ]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flipped bit", "truncated", "missing"])
def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_is_used(
    tmp_path: Path, name: str, damage: str
) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    path = checkpoint_folder(tmp_path, 2) / name
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    found, warnings = load_newest(tmp_path, FIX)
    assert found is not None
    assert found.step == 1
    assert len(warnings) == 1
    assert "damaged-step_000002" in warnings[0]
    assert (tmp_path / "damaged-step_000002").is_dir()


def test_no_flipped_bit_of_a_manifest_goes_unnoticed(tmp_path: Path) -> None:
    save(tmp_path, 2)
    path = checkpoint_folder(tmp_path, 2) / "manifest.json"
    content = path.read_bytes()
    unnoticed = []
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 4
        path.write_bytes(damaged)
        try:
            load_checkpoint(tmp_path, 2, FIX)
        except DataError:
            continue
        unnoticed.append(content[:position].count(b"\n"))
    # The command line and white space say nothing about the data.
    lines = content.decode().splitlines()
    assert {lines[line].strip().split(":")[0] for line in unnoticed} <= {'"command"'}


def test_when_every_checkpoint_is_damaged_nothing_starts_over_in_silence(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (checkpoint_folder(tmp_path, 1) / "model.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match=r"every checkpoint in .* is damaged"):
        load_newest(tmp_path, FIX)


def test_without_checkpoints_there_is_nothing_to_resume(tmp_path: Path) -> None:
    assert load_newest(tmp_path / "none", FIX) == (None, [])


def test_a_checkpoint_can_be_written_again_over_itself(tmp_path: Path) -> None:
    assert save(tmp_path, 1) == save(tmp_path, 1)
    assert load_checkpoint(tmp_path, 1, FIX).step == 1


WRITER = """
import sys, torch
from pathlib import Path
from nanochat.checkpoint.store import save_checkpoint
size = int(sys.argv[2])
for step in range(1, 10**6):
    tensor = torch.full((size,), float(step))
    save_checkpoint(Path(sys.argv[1]), step, model={"a": tensor}, optimizer={"b": tensor},
                    state={"progress": {}}, config={}, keep=2)
    print(step, flush=True)
"""


def test_a_kill_at_any_moment_of_a_save_leaves_a_good_checkpoint(tmp_path: Path) -> None:
    for attempt in range(6):
        parent = tmp_path / str(attempt)
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(parent), "2000000"], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.02 * attempt)
        process.send_signal(signal.SIGKILL)
        last_reported = [1, *map(int, process.stdout.read().split())][-1]
        process.wait()
        found, warnings = load_newest(parent, FIX)
        assert warnings == []
        assert found is not None
        assert found.step >= last_reported
        assert (found.model["a"] == found.step).all()
        # What the kill left behind is cleared by the next save.
        save(parent, found.step + 1)
        assert not list(parent.glob(".tmp-*"))
        shutil.rmtree(parent)


def _save_with_files_limited_to(limit: int, parent: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    save(parent, 2, size=100_000)


def test_a_file_system_that_runs_full_costs_nothing_already_saved(tmp_path: Path) -> None:
    """A limit on file size makes the kernel refuse the write in the middle, as a full disk or quota does."""
    save(tmp_path, 1)
    code = (
        "import sys; sys.path[:0] = [sys.argv[1]]\n"
        "from pathlib import Path\n"
        "from test_checkpoint_store import CheckpointNotSavedError, _save_with_files_limited_to\n"
        "try: _save_with_files_limited_to(200_000, Path(sys.argv[2]))\n"
        "except CheckpointNotSavedError as error: print(error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "checkpoint of step 2 could not be written" in result.stdout
    assert "older checkpoints are intact" in result.stdout
    assert [folder.name for folder in tmp_path.iterdir()] == ["step_000001"]
    assert load_newest(tmp_path, FIX)[0] is not None


def test_too_little_free_space_is_noticed_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(CheckpointNotSavedError, match="MB needed"):
        save(tmp_path, 2)
    assert list_steps(tmp_path) == [1]

"""Files appear whole or not at all, and manifests catch every change."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat import files
from nanochat.errors import DataError, UsageError
from nanochat.files import (
    LEASE_STALE_SECONDS,
    file_entry,
    fingerprint,
    leases,
    lock_folder,
    read_json,
    read_manifest,
    refuse_if_used,
    remove_stale_temporaries,
    use_folders,
    verify_files,
    whole_file,
    write_json,
    write_manifest,
    write_text,
)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


def write_half_of(path: Path) -> None:
    with whole_file(path) as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError("the disk is full")


def test_a_failed_write_leaves_the_old_file_and_no_leftover(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError, match="the disk is full"):
        write_half_of(path)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.txt"]


def test_a_writer_killed_at_any_moment_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "numbers.json"
    writer = (
        "import sys; from pathlib import Path; from nanochat.files import write_json\n"
        "for number in range(10**9): write_json(Path(sys.argv[1]), [number] * 20000)"
    )
    for delay in (0.0, 0.013, 0.05):
        process = subprocess.Popen([sys.executable, "-c", writer, str(path)])
        deadline = time.monotonic() + 30
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        numbers = json.loads(path.read_text())
        assert numbers == numbers[:1] * 20000
    remove_stale_temporaries(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["numbers.json"]


@given(json_values)
def test_a_fingerprint_survives_a_trip_through_json_text(value: object) -> None:
    assert fingerprint(value) == fingerprint(json.loads(json.dumps(value)))


def test_a_fingerprint_changes_with_the_value() -> None:
    values = [0, 1, "1", [1], {"1": 1}, {"1": 2}, None, [], {}]
    assert len({fingerprint(value) for value in values}) == len(values)


def test_json_that_no_other_reader_would_accept_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "bad.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_damaged_json_is_reported_with_its_name_and_the_fix(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_text('{"kind": "cor')
    with pytest.raises(DataError, match=r"manifest\.json is damaged.*make it again"):
        read_json(path, "make it again")


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped bit"])
def test_every_damage_to_a_file_is_found(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "data.bin"
    path.write_bytes(bytes(range(256)) * 64)
    write_manifest(tmp_path, "test", [file_entry(path)])
    files = read_manifest(tmp_path, "test", "fix it")["files"]
    verify_files(tmp_path, files, "fix it")
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[:-1])
    else:
        content[1000] ^= 1
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"data\.bin.*fix it"):
        verify_files(tmp_path, files, "fix it")


def test_a_folder_of_another_kind_is_not_taken_for_this_one(tmp_path: Path) -> None:
    write_manifest(tmp_path, "corpus", [])
    with pytest.raises(DataError, match="does not describe a folder of kind 'tokens'"):
        read_manifest(tmp_path, "tokens", "fix it")


def test_a_folder_in_use_is_refused_to_others_and_says_by_whom(tmp_path: Path) -> None:
    holder = (
        "import sys, time; from pathlib import Path; from nanochat.files import use_folders\n"
        "with use_folders('the training of d12', Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    environment = {**os.environ, "SLURM_JOB_ID": "4711"}
    command = [sys.executable, "-c", holder, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match=rf"in use by the training of d12 \(host .*{process.pid}, job 4711"):
            refuse_if_used(tmp_path, "the folder")
        (overridden,) = refuse_if_used(tmp_path, "the folder", force=True)
        assert overridden.pid == process.pid
        process.kill()
    # A kill leaves the lease, which is known for stale and forgotten.
    assert [lease.is_stale for lease in leases(tmp_path)] == [True]
    assert refuse_if_used(tmp_path, "the folder") == []
    assert list(tmp_path.iterdir()) == []


def test_a_lease_of_another_host_is_stale_once_it_is_no_longer_renewed(tmp_path: Path) -> None:
    path = tmp_path / ".use-elsewhere-1-00000000"
    write_json(path, {"what": "a run", "host": "elsewhere", "pid": 1, "job": ""})
    assert not leases(tmp_path)[0].is_stale
    long_ago = time.time() - LEASE_STALE_SECONDS - 5
    os.utime(path, (long_ago, long_ago))
    assert leases(tmp_path)[0].is_stale


def test_who_begins_to_read_forgets_who_has_gone(tmp_path: Path) -> None:
    write_json(tmp_path / ".use-elsewhere-1-0", {"what": "gone", "host": "elsewhere", "pid": 1, "job": ""})
    os.utime(tmp_path / ".use-elsewhere-1-0", (0, 0))
    write_json(tmp_path / ".use-elsewhere-2-0", {"what": "alive", "host": "elsewhere", "pid": 2, "job": ""})
    with use_folders("a run", tmp_path):
        assert sorted(lease.what for lease in leases(tmp_path)) == ["a run", "alive"]


def test_a_lease_is_renewed_while_it_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LEASE_RENEWAL_SECONDS", 0.01)
    with use_folders("a run", tmp_path):
        (lease,) = leases(tmp_path)
        os.utime(lease.path, (0, 0))
        deadline = time.monotonic() + 30
        while leases(tmp_path)[0].is_stale and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not leases(tmp_path)[0].is_stale


def test_ones_own_use_is_no_obstacle_and_leaves_nothing(tmp_path: Path) -> None:
    with use_folders("a run", tmp_path, tmp_path / "missing"):
        assert [lease.is_own for lease in leases(tmp_path)] == [True]
        assert refuse_if_used(tmp_path, "the folder") == []
    assert list(tmp_path.iterdir()) == []


def test_a_linked_folder_is_in_use_under_all_its_names(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with use_folders("a run", tmp_path / "link"):
        assert len(leases(tmp_path / "real")) == len(leases(tmp_path / "link")) == 1


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_is_written_to_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with lock_folder(tmp_path / "model", "the model"):
        pass


def test_a_folder_is_locked_by_one_process_at_a_time(tmp_path: Path) -> None:
    with lock_folder(tmp_path, "the model"), pytest.raises(UsageError, match="is being written by another process"):
        lock_folder(tmp_path, "the model")
    lock_folder(tmp_path, "the model").close()


def test_a_disk_that_is_full_is_told_with_the_file(tmp_path: Path) -> None:
    def write() -> None:
        with whole_file(tmp_path / "shard"):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device: '.*/shard'"):
        write()


def test_a_file_in_place_of_a_folder_has_no_manifest(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("no folder")
    with pytest.raises(DataError, match=r"notes/manifest\.json is missing"):
        read_json(tmp_path / "notes" / "manifest.json", "make it")

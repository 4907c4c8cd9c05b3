"""Files that appear whole or not at all, and manifests that say what a folder of data must contain.

A job can be killed at any instruction and a cluster file system can lose power. So nothing is ever written
under its final name: it goes to a temporary name in the same folder, is flushed to disk, and is renamed, which
POSIX makes atomic. The folder itself is synced last, or the rename may be forgotten.
"""

import errno
import hashlib
import json
import os
import secrets
import shlex
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TextIO

from nanochat.errors import DataError, UsageError

TEMPORARY_MARK = ".tmp-"
MANIFEST_NAME = "manifest.json"
LOCK_NAME = ".lock"
LEASE_MARK = ".use-"
# A reader that has not renewed its lease for so long is dead or cut off. Ten missed renewals: a busy metadata server
# may well miss a few.
LEASE_RENEWAL_SECONDS = 30.0
LEASE_STALE_SECONDS = 300.0
# What flock says where the file system, or its server, has no locks.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that a rename inside it survives a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Flush one file's content to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_sibling(path: Path) -> Path:
    """A name beside `path` that no other process uses and that cleaners recognise by its mark."""
    return path.with_name(f"{TEMPORARY_MARK}{path.name}-{os.getpid()}-{secrets.token_hex(4)}")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path; on success it becomes `path` atomically, on any error it is removed.

    Raises:
        OSError: the file cannot be written (disk full, quota, permissions). `path` is then untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_sibling(path)
    try:
        yield temporary
        sync_file(temporary)
        temporary.replace(path)
    except BaseException as error:
        if isinstance(error, OSError) and error.errno and error.filename is None:
            # Of a write, the system says what went wrong and not where.
            error.filename = str(path)
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder; on success it replaces `folder`, on any error it is removed.

    POSIX cannot exchange two full folders in one rename, so the old one steps aside first. A kill between the
    two renames leaves no folder, which readers report as missing: never a mixture of the two.

    Raises:
        OSError: the folder cannot be written. What was there is then untouched.
    """
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary, previous = temporary_sibling(folder), temporary_sibling(folder)
    temporary.mkdir()
    try:
        yield temporary
        for path in temporary.rglob("*"):
            sync = sync_folder if path.is_dir() else sync_file
            sync(path)
        sync_folder(temporary)
        if folder.exists():
            folder.rename(previous)
        try:
            temporary.rename(folder)
        except BaseException:
            if previous.exists():
                previous.rename(folder)
            raise
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(folder.parent)
    shutil.rmtree(previous, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as readable JSON atomically. NaN and infinity are refused: they are not JSON."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: Path, fix: str | None = None) -> Any:
    """Read a JSON file.

    Raises:
        DataError: it is missing or not JSON; `fix` names the command that makes it again.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{path} is missing", fix) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged ({error})", fix) from None


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fingerprint(value: Any) -> str:
    """Sixteen hexadecimal digits that are equal exactly when two JSON-able values are equal."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def file_entry(path: Path, **extra: Any) -> dict[str, Any]:
    """A manifest's line about one file: name, bytes, sha256, and what else the caller counts (rows, tokens)."""
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_file(path), **extra}


def write_manifest(folder: Path, kind: str, files: list[dict[str, Any]], **about: Any) -> dict[str, Any]:
    """Write `manifest.json`, the last file of a folder of data: without it the folder does not count as made.

    Args:
        folder: the folder that holds `files`.
        kind: what the folder is (`corpus`, `tokens`, `tokenizer`, `checkpoint`).
        files: entries from `file_entry`.
        about: schema, totals, where it came from, the seed: whatever a reader needs to trust or remake it.

    Returns:
        The manifest as written. Its `fingerprint` covers the content and `about`, not the command line, so two
        machines that made the same data agree.
    """
    content = {"kind": kind, "files": files, **about}
    manifest = {**content, "fingerprint": fingerprint(content), "command": shlex.join(sys.argv)}
    write_json(folder / MANIFEST_NAME, manifest)
    return manifest


def read_manifest(folder: Path, kind: str, fix: str) -> dict[str, Any]:
    """Read a folder's manifest and check it against its own fingerprint and the expected kind.

    Raises:
        DataError: missing, damaged, or of another kind; `fix` names the command that makes the folder.
    """
    manifest = read_json(folder / MANIFEST_NAME, fix)
    if not isinstance(manifest, dict) or manifest.get("kind") != kind:
        raise DataError(f"{folder / MANIFEST_NAME} does not describe a folder of kind {kind!r}", fix)
    content = {key: value for key, value in manifest.items() if key not in ("fingerprint", "command")}
    if manifest.get("fingerprint") != fingerprint(content):
        raise DataError(f"{folder / MANIFEST_NAME} is damaged: it does not match its own fingerprint", fix)
    return manifest


def verify_files(folder: Path, files: list[dict[str, Any]], fix: str, checksums: bool = True) -> None:
    """Check files against their manifest entries.

    Args:
        checksums: also read every byte; without it only presence and size are checked.

    Raises:
        DataError: names the first file that is missing, truncated or changed.
    """
    for entry in files:
        path = folder / entry["name"]
        if not path.is_file():
            raise DataError(f"{path} is missing", fix)
        if path.stat().st_size != entry["bytes"]:
            raise DataError(f"{path} has {path.stat().st_size} bytes, its manifest says {entry['bytes']}", fix)
        if checksums and sha256_file(path) != entry["sha256"]:
            raise DataError(f"{path} does not match its checksum: a changed or damaged file", fix)


def lock_folder(folder: Path, what: str) -> TextIO:
    """Keep every other process from writing to a folder until the result is closed, or this process ends, however.

    The kernel's lock (flock) goes with the process, so a kill leaves nothing stale behind. A file system that has no
    such locks, as Lustre mounted without `flock`, gets none: to refuse all work on it would be worse.

    Args:
        what: what is locked, for the error.

    Returns:
        The lock; close it to give it up.

    Raises:
        UsageError: another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stream = (folder / LOCK_NAME).open("a")
    try:
        lock_stream(stream, wait=False)
    except BlockingIOError:
        stream.close()
        raise UsageError(
            f"{what} is being written by another process (it holds {folder / LOCK_NAME})",
            "wait for it or stop it, or choose another name",
        ) from None
    return stream


def lock_stream(stream: IO[Any], *, wait: bool) -> None:
    """Take the kernel's lock on an open file, where its file system has locks.

    Raises:
        BlockingIOError: another process holds it, and this one is not to wait.
    """
    import fcntl

    try:
        fcntl.flock(stream, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise


@dataclass(frozen=True)
class Lease:
    """Who reads a folder: a file beside the data, whose time of change is the reader's heartbeat."""

    path: Path
    what: str
    host: str
    pid: int
    job: str
    age_seconds: float

    @property
    def is_own(self) -> bool:
        """Whether this very process holds it."""
        return self.host == socket.gethostname() and self.pid == os.getpid()

    @property
    def is_stale(self) -> bool:
        """Whether its holder has gone: it stopped renewing, or is not among the processes of this host."""
        return self.age_seconds > LEASE_STALE_SECONDS or (self.host == socket.gethostname() and not _runs(self.pid))

    def __str__(self) -> str:
        job = f", job {self.job}" if self.job else ""
        return f"{self.what} (host {self.host}, process {self.pid}{job}, last seen {self.age_seconds:.0f} s ago)"


@contextmanager
def use_folders(what: str, *folders: Path) -> Iterator[None]:
    """Tell writers on every machine that folders are being read, as long as the context lasts.

    In each a file that is renewed every LEASE_RENEWAL_SECONDS, because flock does not reach other nodes on every
    network file system. A folder that this process may not write to gets none: it is not ours to replace either.

    Args:
        what: who reads, for the error of the one who would write.
        folders: those that are not there are passed over.
    """
    host, pid = socket.gethostname(), os.getpid()
    name = f"{LEASE_MARK}{host}-{pid}-{secrets.token_hex(4)}"
    held: list[Path] = []
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(LEASE_RENEWAL_SECONDS):
            for path in held:
                # A folder that was replaced by force has lost the lease with all else.
                with suppress(OSError):
                    os.utime(path)

    try:
        for folder in folders:
            with suppress(OSError):
                if folder.is_dir():
                    _forget_stale(leases(folder))
                    path = folder.resolve() / name
                    write_json(
                        path, {"what": what, "host": host, "pid": pid, "job": os.environ.get("SLURM_JOB_ID", "")}
                    )
                    held.append(path)
        if held:
            threading.Thread(target=renew, name="leases", daemon=True).start()
        yield
    finally:
        ended.set()
        for path in held:
            with suppress(OSError):
                path.unlink(missing_ok=True)


def leases(folder: Path) -> list[Lease]:
    """Who says to read a folder, those included that are stale.

    Age is told by the clock of the file system, as those of two nodes may differ by more than a heartbeat.
    """
    found = sorted(folder.glob(f"{LEASE_MARK}*"))
    if not found:
        return []
    now = _file_system_time(folder)
    result = []
    for path in found:
        # It may end its use while we look, and one that cannot be read was torn by a crash of its host.
        with suppress(DataError, OSError, KeyError, TypeError):
            about = read_json(path)
            age = max(0.0, now - path.stat().st_mtime)
            result.append(Lease(path, about["what"], about["host"], about["pid"], about["job"], age))
    return result


def refuse_if_used(
    folder: Path, what: str, *, force: bool = False, fix: str = "wait for it, or stop it"
) -> list[Lease]:
    """Check that no other process reads a folder that is to be rewritten or replaced; forget stale leases.

    Args:
        what: what the folder is, for the error.
        force: go on all the same.
        fix: for the error.

    Returns:
        Whose use was overridden: empty without `force`.

    Raises:
        UsageError: it is in use; names by whom.
    """
    found = leases(folder)
    _forget_stale(found)
    users = [lease for lease in found if not lease.is_own and not lease.is_stale]
    if users and not force:
        raise UsageError(f"{what} is in use by {'; '.join(map(str, users))}", fix)
    return users


def _forget_stale(found: list[Lease]) -> None:
    for lease in found:
        if lease.is_stale:
            # It may be another user's.
            with suppress(OSError):
                lease.path.unlink(missing_ok=True)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _file_system_time(folder: Path) -> float:
    probe = folder / f"{TEMPORARY_MARK}time-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        probe.touch(exist_ok=False)
        return probe.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        probe.unlink(missing_ok=True)


def remove_stale_temporaries(folder: Path) -> None:
    """Remove what killed writers of this folder left behind. Call only where no other writer can be alive."""
    if not folder.is_dir():
        return
    for leftover in folder.glob(f"{TEMPORARY_MARK}*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)

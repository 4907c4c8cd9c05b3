"""Bring files from elsewhere: carried on after any kill, held against a checksum, whole or not at all.

What has come of a file waits under a name that begins with `.part-` and holds which content it is a part of, so a new
process carries on where a killed one stopped, and never mixes two versions. Only a file whose size and checksum are
right gets its own name. The hub's library does neither: after a kill it starts from nothing, and it takes a flipped
byte for the file.
"""

import hashlib
import http.client
import os
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from glob import escape
from io import BufferedRandom
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from nanochat.errors import DataError, NanochatError, UsageError
from nanochat.files import fingerprint, lock_stream, sync_file, sync_folder

Item = TypeVar("Item")
Result = TypeVar("Result")
# Told of each number of bytes that came, or, negative, that must come again.
Advance = Callable[[int], None]

# The fix for a status that is not one of success, or for 0, no answer at all, from it and its headers.
Explain = Callable[[int, Mapping[str, str]], str]

PART_MARK = ".part-"
CHUNK_BYTES = 1 << 20
TIMEOUT_SECONDS = 20.0
# A server that never answered will not: its name or the network is wrong. One that did is waited for.
FIRST_PATIENCE = 3.0
DEFAULT_PATIENCE = 120.0
FIRST_WAIT = 0.5
LONGEST_WAIT = 30.0


class LostError(NanochatError):
    """The other side did not answer, or stopped half-way: trying again may help.

    Attributes:
        wait: seconds that it asked to be left alone.
    """

    wait = 0.0


@dataclass(frozen=True)
class Remote:
    """A file elsewhere.

    Attributes:
        what: names it in messages.
        size: bytes.
        version: equal for equal content; a part is carried on only for the same version.
        read: its bytes from some byte on; raises LostError where trying again may help.
        start_hash: begins the checksum that the other side gave; `None` if it gave none.
        checksum: what must come out, in hexadecimal.
    """

    what: str
    size: int
    version: str
    read: Callable[[int], AbstractContextManager[Iterator[bytes]]]
    start_hash: Callable[[], Any] | None = None
    checksum: str = ""


@dataclass
class Patience:
    """How long to go on without a byte, waiting twice as long each time.

    Attributes:
        seconds: of no success after which it ends.
    """

    seconds: float
    _wait: float = field(default=FIRST_WAIT, init=False)
    _since: float = field(default_factory=time.monotonic, init=False)

    def renew(self) -> None:
        """Something came."""
        self._wait, self._since = FIRST_WAIT, time.monotonic()

    def wait(self, error: LostError, check: Callable[[], None] = lambda: None) -> None:
        """Wait before another attempt, or raise `error` if there is to be none; `check` may end the wait by raising."""
        pause = max(self._wait, error.wait)
        until = time.monotonic() + pause
        if until > self._since + self.seconds:
            raise error
        while (left := until - time.monotonic()) > 0:
            check()
            time.sleep(min(left, 0.5))
        self._wait = min(2 * self._wait, LONGEST_WAIT)


def patience_seconds() -> float:
    """How long a server that answered before is waited for: NANOCHAT_RETRY_SECONDS, or two minutes.

    Raises:
        UsageError: the variable holds no number.
    """
    given = os.environ.get("NANOCHAT_RETRY_SECONDS") or str(DEFAULT_PATIENCE)
    try:
        return float(given)
    except ValueError:
        raise UsageError(f"NANOCHAT_RETRY_SECONDS is {given!r}, not a number of seconds", "unset it") from None


def fetch(remote: Remote, path: Path, advance: Advance = lambda count: None) -> bool:
    """Bring a file to `path`, carrying on with what an earlier attempt left.

    Processes that want the same file at once wait for one another, and one of them brings it.

    Args:
        advance: told of bytes as they come, those that were here already among them.

    Returns:
        Whether it was brought now; False if another process just did.

    Raises:
        DataError: what comes does not match its checksum, twice.
        NanochatError: the other side refuses, or does not answer for as long as there is patience.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{PART_MARK}{fingerprint(remote.version)}-{path.name}")
    with _open_part(part, path) as stream:
        if stream is None:
            advance(remote.size)
            return False
        for _ in range(2):
            if _complete(remote, stream, advance) in ("", remote.checksum):
                sync_file(part)
                part.replace(path)
                sync_folder(path.parent)
                for older in path.parent.glob(f"{PART_MARK}{'?' * 16}-{escape(path.name)}"):
                    older.unlink(missing_ok=True)
                return True
            stream.truncate(0)
            advance(-remote.size)
        part.unlink()
    raise DataError(
        f"{remote.what} came twice with bytes that do not match its checksum",
        "something between here and there changes it: try another network or mirror, then run the same command",
    )


def matches(remote: Remote, path: Path) -> bool:
    """Whether a file that is here is what is there, by its size and, where there is one, its checksum."""
    if path.stat().st_size != remote.size:
        return False
    if remote.start_hash is None:
        return True
    digest = remote.start_hash()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return str(digest.hexdigest()) == remote.checksum


@contextmanager
def _open_part(part: Path, path: Path) -> Iterator[BufferedRandom | None]:
    """A part of a file, locked, or `None` if another process made it the file meanwhile. An empty one does not stay."""
    while True:
        with closing(os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT, 0o666), "r+b")) as stream:
            lock_stream(stream, wait=True)
            # Whoever held the lock may have renamed or removed what was opened.
            if not (part.exists() and os.path.samestat(os.fstat(stream.fileno()), part.stat())):
                if not path.exists():
                    continue
                yield None
                return
            try:
                yield stream
            except BaseException:
                if os.fstat(stream.fileno()).st_size == 0:
                    part.unlink(missing_ok=True)
                raise
            return


def _complete(remote: Remote, stream: BufferedRandom, advance: Advance) -> str:
    """Add what is missing of a part, and return the checksum of all of it, empty if there is none to compare with."""
    digest = remote.start_hash() if remote.start_hash else None
    stream.truncate(min(os.fstat(stream.fileno()).st_size, remote.size))
    stream.seek(0)
    while chunk := stream.read(CHUNK_BYTES):
        advance(len(chunk))
        if digest:
            digest.update(chunk)
    patience = Patience(patience_seconds())
    while (have := stream.tell()) < remote.size:
        error = LostError(f"{remote.what} was not downloaded: the connection was cut", "run the same command again")
        try:
            with remote.read(have) as chunks:
                for chunk in chunks:
                    if stream.tell() + len(chunk) > remote.size:
                        raise DataError(f"{remote.what} has more than its {remote.size} bytes", "run it again later")
                    stream.write(chunk)
                    advance(len(chunk))
                    if digest:
                        digest.update(chunk)
        except LostError as lost:
            error = lost
        stream.flush()
        if stream.tell() > have:
            patience.renew()
        elif stream.tell() < remote.size:
            patience.wait(error, lambda: advance(0))
    return digest.hexdigest() if digest else ""


def in_parallel(
    work: Callable[[Item, Advance], Result], items: Iterable[Item], workers: int, advance: Advance = lambda count: None
) -> Iterator[Result]:
    """Yield what `work` makes of each item, as it gets ready; the first that fails ends the others at their next byte.

    Args:
        advance: told of bytes by one thread at a time.
    """
    lock, stop = threading.Lock(), threading.Event()

    def counted(count: int) -> None:
        if stop.is_set():
            raise _StoppedError
        with lock:
            advance(count)

    with ThreadPoolExecutor(max(1, workers)) as executor:
        futures = [executor.submit(work, item, counted) for item in items]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            stop.set()
            executor.shutdown(wait=False, cancel_futures=True)
            raise


class _StoppedError(Exception):
    """Another file failed, or the person stopped it all."""


class _SameHostRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but gives a token to nobody else: storage behind the hub refuses requests that carry one."""

    def redirect_request(self, req: urllib.request.Request, *arguments: Any) -> urllib.request.Request | None:
        new = super().redirect_request(req, *arguments)
        if new is not None and urlsplit(new.full_url).netloc != urlsplit(req.full_url).netloc:
            new.remove_header("Authorization")
        return new


def explain_plainly(status: int, headers: Mapping[str, str]) -> str:
    """What mends a refusal, of a server of which nothing is known."""
    if status == 0:
        return "run it on a machine with network"
    return "check the address" if 400 <= status < 500 else "run the same command again later"


@contextmanager
def open_url(
    url: str,
    what: str,
    *,
    headers: Mapping[str, str] | None = None,
    explain: Explain = explain_plainly,
) -> Iterator[http.client.HTTPResponse]:
    """The answer to a request, redirects followed.

    Args:
        what: what fails if it fails, for the message.
        explain: says what mends it.

    Raises:
        LostError: no answer, or one that says to come again later.
        NanochatError: the server refuses.
    """
    opener = urllib.request.build_opener(_SameHostRedirects)
    request = urllib.request.Request(url, headers={"User-Agent": "nanochat", **(headers or {})})
    try:
        with opener.open(request, timeout=TIMEOUT_SECONDS) as response:
            yield response
    except urllib.error.HTTPError as error:
        with error:
            failed = f"{what}: the server answered {error.code}"
            fix = explain(error.code, dict(error.headers))
            if error.code not in (408, 425, 429) and error.code < 500:
                raise NanochatError(failed, fix) from None
            lost = LostError(failed, fix)
            asked = error.headers.get("Retry-After", "")
            lost.wait = min(float(asked), LONGEST_WAIT) if asked.isdecimal() else 0.0
        raise lost from None
    except (urllib.error.URLError, http.client.HTTPException, ssl.SSLError, ConnectionError, TimeoutError) as error:
        reason = str(getattr(error, "reason", error)) or type(error).__name__
        raise LostError(f"{what}: {urlsplit(url).netloc} cannot be reached ({reason})", explain(0, {})) from None


@contextmanager
def read_url(
    url: str,
    what: str,
    start: int,
    *,
    headers: Mapping[str, str] | None = None,
    explain: Explain = explain_plainly,
) -> Iterator[Iterator[bytes]]:
    """The bytes of an address from some byte on. Raises as `open_url` does."""
    ranged = {"Range": f"bytes={start}-"} if start else {}
    with open_url(url, what, headers={**(headers or {}), **ranged}, explain=explain) as response:
        if start and response.status != 206:
            # A server that knows no ranges sends all of it.
            left = start
            while left and (skipped := response.read(min(left, CHUNK_BYTES))):
                left -= len(skipped)
        yield iter(lambda: response.read(CHUNK_BYTES), b"")


def patiently(ask: Callable[[], Result], seconds: float = FIRST_PATIENCE) -> Result:
    """Ask for something small, a few times if it must be; only for seconds unless something is known to be there."""
    patience = Patience(seconds)
    while True:
        try:
            return ask()
        except LostError as error:
            patience.wait(error)


def path_inside(folder: Path, name: str) -> Path:
    """Where a file of this name from elsewhere goes in a folder.

    Raises:
        DataError: the name would lead out of it.
    """
    parts = name.split("/")
    if not name or "\\" in name or any(part in ("", ".", "..") for part in parts):
        raise DataError(f"{name!r} is a name that could lead out of {folder}", "do not trust where it comes from")
    return folder.joinpath(*parts)


def url_remote(url: str, what: str, sha256: str = "") -> Remote:
    """A file at an address.

    Args:
        sha256: what it must have, if that is known.

    Raises:
        NanochatError: it cannot be reached, or does not say how large it is.
    """
    failed = f"{what} was not downloaded from {url}"

    def ask() -> Mapping[str, str]:
        with open_url(url, failed) as response:
            return dict(response.headers)

    headers = patiently(ask)
    length = headers.get("Content-Length", "")
    if not length.isdecimal():
        raise NanochatError(f"{failed}: the server does not say how large it is", "name another address")
    return Remote(
        what=what,
        size=int(length),
        version=sha256 or f"{url} {headers.get('ETag', '')} {length}",
        read=partial(read_url, url, failed),
        start_hash=hashlib.sha256 if sha256 else None,
        checksum=sha256,
    )

"""The Hugging Face Hub: who asks, what a repository of data holds, and files checked against the hub's checksums.

Metadata and files are asked for with plain requests. What the hub's library adds to them, a cache that other programs
share, does not help here, and its downloads neither carry on after a kill nor notice a flipped byte. HF_ENDPOINT,
HF_TOKEN and HF_HUB_OFFLINE mean the same as there.
"""

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from nanochat.corpus.fetch import Advance, LostError, Remote, fetch, open_url, path_inside, patiently, read_url
from nanochat.errors import DataError, NanochatError, UsageError

# What many guides call it; the hub's library does not know these names.
OTHER_TOKEN_NAMES = ("HUGGINGFACE_HUB_TOKEN", "HUGGINGFACE_TOKEN")
COMMIT = re.compile(r"[0-9a-f]{40}")
REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


@dataclass(frozen=True)
class HubFile:
    """A file of a repository.

    Attributes:
        size: bytes.
        checksum: SHA-256 of large files; of small ones, which git holds itself, git's SHA-1.
        is_large: which of the two.
    """

    size: int
    checksum: str
    is_large: bool


@dataclass(frozen=True)
class HubRepository:
    """A data set's repository at one commit.

    Attributes:
        name: `OWNER/NAME`.
        commit: what the revision that was asked for stands for now.
        files: by name.
    """

    name: str
    commit: str
    files: Mapping[str, HubFile]

    def remote(self, name: str) -> Remote:
        """A file of it, to be fetched.

        Raises:
            DataError: there is no such file.
        """
        if name not in self.files:
            raise DataError(f"{self.name} at {self.commit} has no file {name}", "choose another --revision")
        file = self.files[name]
        return Remote(
            what=f"{self.name}/{name}",
            size=file.size,
            version=file.checksum,
            read=partial(_read_file, self, name),
            start_hash=hashlib.sha256 if file.is_large else partial(_git_hash, file.size),
            checksum=file.checksum,
        )


def open_repository(name: str, revision: str = "main") -> HubRepository:
    """Ask the hub what a data set's repository holds.

    Args:
        revision: branch, tag or commit.

    Raises:
        UsageError: `name` cannot be one.
        NanochatError: the hub cannot be reached or refuses; the message says why.
    """
    if not REPOSITORY.fullmatch(name):
        raise UsageError(f"{name!r} is not a data set's name", "give OWNER/NAME, as in its address on the hub")
    failed = f"{name} at {revision} was not downloaded"
    _refuse_offline(failed)
    url = f"{_endpoint()}/api/datasets/{name}/revision/{quote(revision, safe='')}?blobs=true"
    explain = partial(_explain, name)

    def ask() -> Any:
        with open_url(url, failed, headers=_headers(), explain=explain) as response:
            return response.read()

    answer = patiently(ask)
    try:
        found = json.loads(answer)
        return HubRepository(name, found["sha"], {entry["rfilename"]: _file(entry) for entry in found["siblings"]})
    except (ValueError, KeyError, TypeError):
        raise NanochatError(f"{failed}: {_endpoint()} does not answer as the hub does", "check HF_ENDPOINT") from None


def download_file(
    repository: str, name: str, revision: str, folder: Path, advance: Advance = lambda count: None
) -> Path:
    """Bring a file of a data set into a folder, under its own name, unless one of its size is there.

    Several processes may want the same file at once. A name becomes a file's only after it was checked, so what is
    there is whole.

    Args:
        repository: `OWNER/NAME`.
        revision: branch, tag or commit; a commit is looked up once per process.
        advance: told of bytes as they come.

    Raises:
        DataError: the repository has no such file, or the file comes damaged, twice.
        NanochatError: the hub cannot be reached or refuses.
    """
    opened = (_open_commit if COMMIT.fullmatch(revision) else open_repository)(repository, revision)
    return download_from(opened, name, folder, advance)


def download_from(repository: HubRepository, name: str, folder: Path, advance: Advance = lambda count: None) -> Path:
    """As `download_file`, of a repository that was opened."""
    path, remote = path_inside(folder, name), repository.remote(name)
    if path.is_file() and path.stat().st_size == remote.size:
        advance(remote.size)
    else:
        fetch(remote, path, advance)
    return path


def hub_api() -> Any:
    """The hub's library, asking with our token."""
    from huggingface_hub import HfApi

    return HfApi(endpoint=_endpoint(), token=hub_token())


def hub_file_system() -> Any:
    """The hub as fsspec sees it, asking with our token."""
    from huggingface_hub import HfFileSystem

    return HfFileSystem(endpoint=_endpoint(), token=hub_token())


def hub_token() -> str | None:
    """The token to ask with: HF_TOKEN, or what `hf auth login` stored; also under the name that many guides give it."""
    from huggingface_hub import get_token

    token = get_token()
    for name in OTHER_TOKEN_NAMES:
        if token is None and (token := os.environ.get(name, "").strip() or None):
            _hint(name)
    return token


@contextmanager
def hub_errors(what: str, repository: str = "") -> Iterator[None]:
    """Turn what the hub's library raises into one line with the fix, for those who read through it.

    Args:
        what: what fails if it fails.
        repository: for the fix, `OWNER/NAME`.

    Raises:
        NanochatError: the hub cannot be reached or refuses.
    """
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    _refuse_offline(what)
    try:
        yield
    except OfflineModeIsEnabled:
        raise NanochatError(f"{what}: HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE") from None
    except HfHubHTTPError as error:
        response = error.response
        fix = _explain(repository, response.status_code, response.headers)
        raise NanochatError(f"{what}: the server answered {response.status_code}", fix) from None
    except NanochatError:
        raise
    except Exception as error:
        # What a lost connection raises depends on the version of huggingface_hub.
        if not type(error).__module__.startswith("httpx") and not isinstance(error, ConnectionError | TimeoutError):
            raise
        raise LostError(
            f"{what}: the hub cannot be reached ({str(error).splitlines()[0] if str(error) else type(error).__name__})",
            _explain(repository, 0, {}),
        ) from None


@cache
def _open_commit(name: str, commit: str) -> HubRepository:
    return open_repository(name, commit)


def _read_file(repository: HubRepository, name: str, start: int) -> AbstractContextManager[Iterator[bytes]]:
    url = f"{_endpoint()}/datasets/{repository.name}/resolve/{repository.commit}/{quote(name)}"
    what = f"{repository.name}/{name} was not downloaded"
    return read_url(url, what, start, headers=_headers(), explain=partial(_explain, repository.name))


def _file(entry: Any) -> HubFile:
    if lfs := entry.get("lfs"):
        return HubFile(lfs["size"], lfs["sha256"], is_large=True)
    return HubFile(entry["size"], entry["blobId"], is_large=False)


def _git_hash(size: int) -> Any:
    return hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"


def _headers() -> dict[str, str]:
    token = hub_token()
    return {"Authorization": f"Bearer {token}"} if token else {}


def _refuse_offline(failed: str) -> None:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise NanochatError(f"{failed}: HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE")


def _explain(repository: str, status: int, headers: Mapping[str, str]) -> str:
    """What mends a refusal. The hub answers 401 also for what is not there, lest it tell what is private."""
    page = f"{_endpoint()}/datasets/{repository}" if repository else "the data set's page"
    if status == 0:
        return "run it on a machine with network, or name a mirror in HF_ENDPOINT"
    if headers.get("X-Error-Code") == "GatedRepo" or status == 403:
        fix = f"ask for access on {page}"
        return fix if hub_token() else f"{fix}, then set HF_TOKEN to a token of that account"
    if status == 401 and hub_token():
        return "the token in HF_TOKEN is not accepted, or this is not there for its account: check both"
    if status == 401:
        return f"check that {page} is there; if it is private, set HF_TOKEN"
    if status == 404:
        return "check HF_ENDPOINT, the name and --revision"
    if status == 429:
        return "wait some minutes and run the same command again" + ("" if hub_token() else ", with HF_TOKEN set")
    return "run the same command again later"


@cache
def _hint(name: str) -> None:
    print(f"warning: {name} is not a name that the hub's tools know; set HF_TOKEN instead", file=sys.stderr)

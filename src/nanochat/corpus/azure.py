"""Parquet files in Azure Blob Storage: downloaded whole and verified, or read column by column where they lie.

Who asks is told by environment variables alone, as command lines are seen by everyone on a machine and kept in files;
nothing that is printed or written down holds a secret. Every range comes with its MD5 by the service, and of the
version of the blob, its ETag, that was there at first. A blob that was uploaded in one piece also has an MD5 of the
whole, against which the file is held.
"""

import base64
import hashlib
import logging
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from nanochat.corpus.fetch import (
    Advance,
    LostError,
    Remote,
    fetch,
    in_parallel,
    path_inside,
    patience_seconds,
    patiently,
)
from nanochat.errors import DataError, NanochatError, UsageError
from nanochat.files import read_json, write_json

if TYPE_CHECKING:
    from azure.storage.blob import ContainerClient

SUFFIX = ".parquet"
RECEIPT_SUFFIX = ".receipt.json"
# The service gives a range's MD5 for 4 MiB at most.
RANGE_BYTES = 4 * 2**20
CONNECT_SECONDS = 10
READ_SECONDS = 60
CREDENTIAL_NAMES = (
    "AZURE_STORAGE_ACCOUNT",
    "AZURE_STORAGE_SERVICE_ENDPOINT",
    "AZURE_STORAGE_CONNECTION_STRING",
    "AZURE_STORAGE_SAS_URL",
    "AZURE_STORAGE_SAS_TOKEN",
    "AZURE_STORAGE_KEY",
)
SECRETS = CREDENTIAL_NAMES[2:]


@dataclass(frozen=True)
class Blob:
    """One blob as it was listed.

    Attributes:
        name: in its container.
        size: bytes.
        etag: its version.
        md5: of all of it in hexadecimal, empty if the service has none.
    """

    name: str
    size: int
    etag: str
    md5: str


def read_credentials(path: Path) -> None:
    """Put the variables of a file, lines of NAME=VALUE, into the environment of this process, in place of its secrets.

    Raises:
        UsageError: others may read the file, or it holds something else.
    """
    if not path.is_file():
        raise UsageError(f"{path} is not there", "check --credentials")
    if path.stat().st_mode & 0o077:
        raise UsageError(f"{path} may be read by others, and holds secrets", f"chmod 600 {path}")
    for name in SECRETS:
        os.environ.pop(name, None)
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        name, equals, value = line.strip().removeprefix("export ").partition("=")
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if not equals or name not in CREDENTIAL_NAMES:
            raise UsageError(f"{path}:{number} sets none of the known names", f"use {', '.join(CREDENTIAL_NAMES)}")
        os.environ[name] = value.strip().strip("'\"")


def check_container(container: str) -> str:
    """Return a container's name if it is one.

    Raises:
        UsageError: it cannot be one; an address with a signature is not repeated.
    """
    if "sig=" in container or "?" in container:
        raise UsageError(
            "--container holds a signature, which anyone on this machine can read there",
            "put the address into AZURE_STORAGE_SAS_URL, or a file for --credentials, and give the container's name",
        )
    if not re.fullmatch(r"\$root|\$web|[a-z0-9](?:-?[a-z0-9]){2,62}", container):
        raise UsageError(
            f"{container!r} is not a container's name", "give the name alone; the storage account with --account"
        )
    return container


@cache
def open_container(container: str) -> "ContainerClient":
    """A client for a container, by what the environment says; at last for anyone, then as this machine's identity.

    Raises:
        UsageError: the account is not named, or what the environment holds is malformed or has expired.
        NanochatError: it cannot be reached, or refuses.
    """
    try:
        from azure.storage.blob import ContainerClient
    except ImportError:
        raise UsageError(
            "reading from Azure takes the package azure-storage-blob", "pip install 'nanochat-hpc[azure]'"
        ) from None
    options: dict[str, Any] = {
        # One patience is enough, and ours tells progress from none.
        "retry_total": 0,
        "connection_timeout": CONNECT_SECONDS,
        "read_timeout": READ_SECONDS,
        "max_single_get_size": RANGE_BYTES,
        "max_chunk_get_size": RANGE_BYTES,
    }
    name = next((name for name in SECRETS if _variable(name)), "")
    secret = _variable(name)
    try:
        if name == "AZURE_STORAGE_CONNECTION_STRING":
            return _of_account(ContainerClient.from_connection_string(secret, container, **options), name)
        if name == "AZURE_STORAGE_SAS_URL":
            return _of_account(ContainerClient.from_container_url(_sas_url(secret, container), **options), name)
        if name == "AZURE_STORAGE_SAS_TOKEN":
            _check_expiry(name, secret)
            return ContainerClient(_account_url(), container, credential=secret.removeprefix("?"), **options)
        if name == "AZURE_STORAGE_KEY":
            base64.b64decode(secret, validate=True)
            account = _variable("AZURE_STORAGE_ACCOUNT")
            key = {"account_name": account, "account_key": secret} if account else secret
            return ContainerClient(_account_url(), container, credential=key, **options)
    except ValueError:
        raise UsageError(f"{name} is malformed", "copy it again, whole and without quotes") from None
    anyone = ContainerClient(_account_url(), container, **options)
    return anyone if _is_public(anyone) else _as_identity(container, options)


def list_blobs(container: str, prefix: str) -> list[Blob]:
    """The parquet files of a container below a prefix, in the order of their names.

    Args:
        prefix: a folder, or one file.

    Raises:
        UsageError: there are none.
        NanochatError: the container cannot be reached, or refuses.
    """
    what, below = f"{container}/{prefix} was not listed", prefix.strip("/")
    if below and not below.endswith(SUFFIX):
        below += "/"
    client = open_container(container)

    def ask() -> list[Any]:
        with _azure_errors(what):
            return list(client.list_blobs(name_starts_with=below or None))

    blobs = []
    for item in patiently(ask):
        if item.name.endswith(SUFFIX):
            md5 = item.content_settings.content_md5
            blobs.append(Blob(item.name, item.size, item.etag.strip('"'), md5.hex() if md5 else ""))
    if not blobs:
        raise UsageError(f"{container} has no {SUFFIX} files below {below or 'its root'}", "check --prefix")
    return sorted(blobs, key=lambda blob: blob.name)


def download_blobs(
    container: str, blobs: Sequence[Blob], folder: Path, workers: int, advance: Advance = lambda count: None
) -> int:
    """Bring blobs into a folder, under their names in the container; those that are there whole are kept.

    Beside each file is a receipt: which version of the blob it is, and how that was verified.

    Returns:
        How many had to be brought.

    Raises:
        DataError: a blob changed meanwhile, or does not match its checksum.
        NanochatError: the container cannot be reached, or refuses.
    """
    account = account_name(container)

    def bring(blob: Blob, advance: Advance) -> bool:
        path = path_inside(folder, blob.name)
        receipt_path, receipt = _receipt_path(path), _receipt(blob, account)
        if receipt_path.is_file() and read_json(receipt_path) == receipt and _is_whole(path, receipt):
            advance(blob.size)
            return False
        # In this order, a kill never leaves a file with another one's receipt.
        path.unlink(missing_ok=True)
        write_json(receipt_path, receipt)
        return fetch(_remote(container, blob), path, advance)

    return sum(in_parallel(bring, blobs, workers, advance))


def account_name(container: str) -> str:
    """The name of the storage account that a container is in. Raises as `open_container` does."""
    return str(open_container(container).account_name)


def downloaded_from(place: Path) -> str:
    """The storage account that a downloaded folder or file came from, if all of it is whole.

    Raises:
        DataError: something is not, or nothing was downloaded.
    """
    fix = "run the same command without --skip-download"
    account = ""
    for path in _with_receipts(place):
        receipt = read_json(_receipt_path(path), fix)
        if not _is_whole(path, receipt):
            raise DataError(f"{path} is not whole", fix)
        account = receipt["account"]
    if not account:
        raise DataError(f"{place} was not downloaded", fix)
    return account


def forget_others(place: Path, folder: Path, blobs: Sequence[Blob]) -> None:
    """Remove what was downloaded to a place in `folder` earlier and is not among `blobs`, lest it pass for theirs."""
    names = {blob.name for blob in blobs}
    for path in _with_receipts(place):
        if path.relative_to(folder).as_posix() not in names:
            path.unlink(missing_ok=True)
            _receipt_path(path).unlink()


class BlobFileSystem(AbstractFileSystem):  # type: ignore[misc]
    """A container as fsspec sees it, to be read only; a path is CONTAINER/NAME."""

    protocol = "azure"
    cachable = False

    def find(
        self, path: str, maxdepth: int | None = None, withdirs: bool = False, detail: bool = False, **options: Any
    ) -> Any:
        """The parquet files below a path."""
        container, _, prefix = path.partition("/")
        found = {f"{container}/{blob.name}": _info(container, blob) for blob in list_blobs(container, prefix)}
        return found if detail else list(found)

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        """Size and version of one blob."""
        container, _, name = path.partition("/")
        for blob in list_blobs(container, name):
            if blob.name == name:
                return _info(container, blob)
        raise FileNotFoundError(path)

    def get_file(self, rpath: str, lpath: str, **options: Any) -> None:
        """Download one blob, verified."""
        fetch(_remote(rpath.partition("/")[0], self.info(rpath)["blob"]), Path(lpath))

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **options: Any) -> Any:
        options.pop("autocommit", None)
        return _BlobFile(self, path, mode, block_size or RANGE_BYTES, **options)


class _BlobFile(AbstractBufferedFile):  # type: ignore[misc]
    """A blob, read in ranges of the version that it had when it was opened."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        def ask() -> bytes:
            with _read(self.path.partition("/")[0], self.details["blob"], start, end - start) as chunks:
                return b"".join(chunks)

        return patiently(ask, patience_seconds())


def _info(container: str, blob: Blob) -> dict[str, Any]:
    return {"name": f"{container}/{blob.name}", "size": blob.size, "type": "file", "blob": blob}


def _remote(container: str, blob: Blob) -> Remote:
    return Remote(
        what=f"{container}/{blob.name}",
        size=blob.size,
        version=f"{blob.etag} {blob.md5}",
        read=partial(_read, container, blob),
        start_hash=partial(hashlib.md5, usedforsecurity=False) if blob.md5 else None,
        checksum=blob.md5,
    )


@contextmanager
def _read(container: str, blob: Blob, start: int, length: int | None = None) -> Iterator[Iterator[bytes]]:
    """The bytes of one version of a blob from some byte on."""
    from azure.core import MatchConditions

    client = open_container(container)
    with _azure_errors(f"{container}/{blob.name} was not downloaded"):
        stream = client.download_blob(
            blob.name,
            offset=start,
            length=blob.size - start if length is None else length,
            etag=blob.etag,
            match_condition=MatchConditions.IfNotModified,
            validate_content=True,
        )
        yield stream.chunks()


def _receipt(blob: Blob, account: str) -> dict[str, Any]:
    verified = "md5 of the whole and of each range" if blob.md5 else "md5 of each range, size and etag"
    return {**vars(blob), "account": account, "verified": verified}


def _receipt_path(path: Path) -> Path:
    return path.with_name(f"{path.name}{RECEIPT_SUFFIX}")


def _with_receipts(place: Path) -> list[Path]:
    """The files of a downloaded folder, or the one file, that have a receipt."""
    receipts = [_receipt_path(place)] if place.name.endswith(SUFFIX) else sorted(place.rglob(f"*{RECEIPT_SUFFIX}"))
    return [path.with_name(path.name.removesuffix(RECEIPT_SUFFIX)) for path in receipts if path.exists()]


def _is_whole(path: Path, receipt: dict[str, Any]) -> bool:
    return path.is_file() and path.stat().st_size == receipt["size"]


def _variable(name: str) -> str:
    return os.environ.get(name, "").strip()


def _account_url() -> str:
    if endpoint := _variable("AZURE_STORAGE_SERVICE_ENDPOINT"):
        return endpoint
    account = _variable("AZURE_STORAGE_ACCOUNT")
    if not re.fullmatch(r"[a-z0-9]{3,24}", account):
        raise UsageError(
            f"{account!r} is not a storage account's name" if account else "the storage account is not named",
            "give --account NAME, or set AZURE_STORAGE_ACCOUNT",
        )
    return f"https://{account}.blob.core.windows.net"


def _of_account(client: "ContainerClient", name: str) -> "ContainerClient":
    account = _variable("AZURE_STORAGE_ACCOUNT")
    if account and client.account_name != account:
        raise UsageError(
            f"{name} is for the storage account {client.account_name!r}, not {account!r}", "leave out one of them"
        )
    return client


def _sas_url(url: str, container: str) -> str:
    """The address of a container with its signature, also where that of the account was given."""
    parts = urlsplit(url)
    if not parts.netloc or not parts.query:
        raise ValueError("no address with a signature")
    _check_expiry("AZURE_STORAGE_SAS_URL", parts.query)
    named = parts.path.strip("/").rpartition("/")[2]
    if named == container:
        return url
    if parse_qs(parts.query).get("sr") == ["c"]:
        raise UsageError(f"AZURE_STORAGE_SAS_URL is for the container {named!r}", f"give --container {named}")
    return parts._replace(path=f"{parts.path.rstrip('/')}/{container}").geturl()


def _check_expiry(name: str, query: str) -> None:
    """The service does not say that it is for its age that it refuses a signature."""
    (ends,) = parse_qs(query.removeprefix("?")).get("se", [""])
    try:
        expiry = datetime.fromisoformat(ends)
    except ValueError:
        return
    if expiry.replace(tzinfo=expiry.tzinfo or UTC).timestamp() < time.time():
        raise UsageError(f"the signature in {name} has expired ({ends})", "have a new one made, with read and list")


def _is_public(client: "ContainerClient") -> bool:
    from azure.core.exceptions import HttpResponseError

    def ask() -> bool:
        with _azure_errors(f"{client.container_name} was not listed"):
            try:
                next(iter(client.list_blobs(results_per_page=1)), None)
            except HttpResponseError as error:
                if error.status_code in (401, 403, 404, 409):
                    return False
                raise
        return True

    return patiently(ask)


def _as_identity(container: str, options: dict[str, Any]) -> "ContainerClient":
    from azure.core.exceptions import ClientAuthenticationError
    from azure.identity import DefaultAzureCredential
    from azure.storage.blob import ContainerClient

    refused = NanochatError(
        f"{container} is not public or not there, and this machine has no credentials for it",
        f"set {', '.join(SECRETS[:-1])} or {SECRETS[-1]}, or log in: az login",
    )
    if not _account_url().startswith("https://"):
        # A token must not travel in the open; the library refuses, too.
        raise refused
    # It tells at length of every kind of identity that is not there.
    logging.getLogger("azure.identity").setLevel(logging.CRITICAL)
    credential = DefaultAzureCredential()
    try:
        credential.get_token("https://storage.azure.com/.default")
    except ClientAuthenticationError:
        raise refused from None
    return ContainerClient(_account_url(), container, credential=credential, **options)


@contextmanager
def _azure_errors(what: str) -> Iterator[None]:
    """One line for what the client raises, made without its texts, which hold addresses with signatures."""
    from azure.core.exceptions import AzureError, HttpResponseError

    try:
        yield
    except HttpResponseError as error:
        code = getattr(error, "error_code", None) or "no reason"
        status, code = error.status_code or 0, str(getattr(code, "value", code))
        failed = f"{what}: the service answered {status} ({code})"
        if status == 412:
            raise DataError(f"{what}: it was changed meanwhile", "run the same command again") from None
        if status in (408, 429) or status >= 500:
            raise LostError(failed, "run the same command again later") from None
        raise NanochatError(failed, _fix(status, code)) from None
    except (AzureError, ConnectionError, TimeoutError) as error:
        if "MD5" in str(error):
            raise LostError(f"{what}: bytes came that do not match their MD5", "run the same command again") from None
        reason = re.search(r"\[Errno -?\d+\] [\w ]+|timed out", str(error))
        raise LostError(
            f"{what}: the storage account cannot be reached ({reason[0] if reason else type(error).__name__})",
            "check --account, and run it on a machine with network",
        ) from None


def _fix(status: int, code: str) -> str:
    if code == "AuthorizationPermissionMismatch":
        return "the signature or role must allow both read and list"
    if code in ("ContainerNotFound", "ResourceNotFound"):
        return "check --container and --account"
    if code == "BlobNotFound":
        return "it was deleted meanwhile: run the same command again"
    if status in (401, 403):
        return "it is not accepted: check the key, the signature and its expiry, the role, and this machine's clock"
    return "check --container, --prefix and --account"

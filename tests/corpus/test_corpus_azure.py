"""From a real Azurite: corpora that are the same however they came, and one line for everything that goes wrong."""

import io
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from azurite import Azurite, azurite
from nanochat.corpus import azure
from nanochat.corpus.fetch import CHUNK_BYTES
from nanochat.corpus.shards import open_corpus, read_texts
from nanochat.corpus.sources import SourceRequest, open_parquet, read_tables
from nanochat.errors import DataError, ExitCode, UsageError
from nanochat.workspace import Workspace

Result = subprocess.CompletedProcess[str]
ROWS = 600


def fat_parquet(seed: int) -> bytes:
    """Texts with a column beside them that is larger than all else."""
    numbers = np.random.default_rng(seed)
    table = pa.table(
        {
            "text": [f"document {seed}.{row}: " + "words of it " * int(numbers.integers(1, 20)) for row in range(ROWS)],
            "embedding": list(numbers.random((ROWS, 2048), dtype=np.float32)),
            "token_count": numbers.integers(1, 9, ROWS),
        }
    )
    stream = io.BytesIO()
    pq.write_table(table, stream)
    return stream.getvalue()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Azurite]:
    with azurite(tmp_path_factory.mktemp("azurite")) as running:
        blobs = {f"top/shard_{index:05d}.parquet": fat_parquet(index) for index in range(3)}
        running.upload("private", {**blobs, "top/_SUCCESS": b"", "topmost/other.parquet": fat_parquet(9)})
        running.upload("pieces", {"a.parquet": blobs["top/shard_00000.parquet"]}, pieces=300_000)
        running.upload("public", {"a.parquet": blobs["top/shard_00000.parquet"]}, public=True)
        yield running


@pytest.fixture
def fetch(store: Azurite, run_command: Callable[..., Result], tmp_path: Path) -> Callable[..., Result]:
    def run(*arguments: str, folder: str = "workspace", **environment: str) -> Result:
        given = environment or {"AZURE_STORAGE_KEY": store.key}
        nothing = dict.fromkeys(azure.CREDENTIAL_NAMES, "")
        command = ("data", "azure", "--workers", "1", "--container", *arguments)
        return run_command(*command, workspace=tmp_path / folder, **{**nothing, **store.environment(**given)})

    return run


@pytest.fixture
def asked(store: Azurite, monkeypatch: pytest.MonkeyPatch) -> Iterator[Azurite]:
    """This process may read it."""
    for name in azure.CREDENTIAL_NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in store.environment(AZURE_STORAGE_KEY=store.key).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NANOCHAT_RETRY_SECONDS", "2")
    azure.open_container.cache_clear()
    yield store
    azure.open_container.cache_clear()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.parquet")}


def test_streamed_and_downloaded_files_make_the_same_corpus_without_the_fat_column(
    fetch: Callable[..., Result], tmp_path: Path
) -> None:
    options = ("private", "--prefix", "top", "--columns", "text,token_count", "--rows-per-shard", "500")
    streamed = fetch(*options, folder="streamed")
    assert streamed.returncode == 0, streamed.stderr
    downloaded = fetch(*options, "--mode", "bulk", folder="downloaded")
    assert downloaded.returncode == 0, downloaded.stderr
    one, other = Workspace(tmp_path / "streamed"), Workspace(tmp_path / "downloaded")
    assert contents(one.base_data) == contents(other.base_data)
    corpus = open_corpus(one.base_data, "", checksums=True)
    assert corpus.train_rows + corpus.val_rows == 3 * ROWS
    assert corpus.manifest["source"]["container"] == "private"
    assert pq.read_schema(corpus.train_shards[0]).names == ["text", "token_count"]
    assert next(read_texts(one.base_data, "train", "")).startswith("document 0.")
    assert not one.downloads.exists()


def test_only_the_wanted_columns_travel(asked: Azurite, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = SourceRequest(place="azure://private/top").list()
    travelled: list[int] = []
    read = azure._read

    @contextmanager
    def counted(*arguments: Any) -> Iterator[Iterator[bytes]]:
        with read(*arguments) as chunks:
            yield (chunk for chunk in chunks if not travelled.append(len(chunk)))

    monkeypatch.setattr(azure, "_read", counted)
    rows = 0
    for file in source.files:
        with open_parquet(source, file, ["text"], tmp_path) as parquet:
            rows += sum(table.num_rows for table in read_tables(parquet, ["text"]))
    assert rows == 3 * ROWS
    assert 0 < sum(travelled) < sum(file.bytes for file in source.files) / 10


def test_a_blob_that_changes_while_it_is_read_is_noticed(asked: Azurite) -> None:
    asked.upload("rewritten", {"a.parquet": b"before" * 100})
    with azure.BlobFileSystem().open("rewritten/a.parquet", block_size=6, cache_type="none") as stream:
        assert stream.read(6) == b"before"
        asked.upload("rewritten", {"a.parquet": b"after!" * 100})
        with pytest.raises(DataError, match="it was changed meanwhile"):
            stream.read(6)


def test_what_was_downloaded_is_used_again_without_network(fetch: Callable[..., Result], tmp_path: Path) -> None:
    options = ("private", "--prefix", "top", "--mode", "bulk", "--rows-per-shard", "500")
    assert fetch(*options).returncode == 0
    (tmp_path / "workspace" / "base_data").rename(tmp_path / "first")
    again = fetch(*options, "--skip-download", AZURE_STORAGE_SERVICE_ENDPOINT="http://127.0.0.1:9/nowhere")
    assert again.returncode == 0, again.stderr
    assert contents(tmp_path / "first") == contents(tmp_path / "workspace" / "base_data")
    next((tmp_path / "workspace" / "downloads").rglob("*.parquet")).write_bytes(b"short")
    (tmp_path / "workspace" / "base_data").rename(tmp_path / "second")
    damaged = fetch(*options, "--skip-download")
    assert damaged.returncode == ExitCode.DATA_DAMAGED
    assert "is not whole — run the same command without --skip-download" in damaged.stderr


@pytest.mark.parametrize("container", ["private", "pieces"])
def test_files_come_verified_and_only_what_is_missing_or_changed_comes_again(
    asked: Azurite, tmp_path: Path, container: str
) -> None:
    blobs = azure.list_blobs(container, "")
    assert bool(blobs[0].md5) == (container == "private")
    assert azure.download_blobs(container, blobs, tmp_path, 4) == len(blobs)
    assert azure.download_blobs(container, blobs, tmp_path, 4) == 0
    (tmp_path / blobs[0].name).write_bytes(b"")
    assert azure.download_blobs(container, blobs, tmp_path, 4) == 1
    client = asked.service.get_container_client(container)
    assert (tmp_path / blobs[0].name).read_bytes() == client.download_blob(blobs[0].name).readall()


def test_a_killed_download_is_carried_on(asked: Azurite, tmp_path: Path) -> None:
    content = os.urandom(40 * 2**20)
    asked.upload("large", {"a.parquet": content})
    (blob,) = azure.list_blobs("large", "")
    call = f"azure.download_blobs('large', azure.list_blobs('large', ''), Path({str(tmp_path)!r}), 1, stop)"
    # It kills itself in the middle, with whatever it has not written yet.
    stop = f"stop = lambda count: os.kill(os.getpid(), {int(signal.SIGKILL)}) if parts() > 2**24 else None"
    parts = f"parts = lambda: sum(p.stat().st_size for p in Path({str(tmp_path)!r}).glob('.part-*'))"
    code = f"import os; from pathlib import Path; from nanochat.corpus import azure; {parts}; {stop}; {call}"
    killed = subprocess.run([sys.executable, "-c", code], check=False)
    assert killed.returncode == -signal.SIGKILL
    (part,) = tmp_path.glob(".part-*")
    kept = part.stat().st_size
    assert 2**24 < kept < len(content)
    asked_for: list[int] = []
    azure.download_blobs("large", [blob], tmp_path, 1, asked_for.append)
    # What was kept is counted first, from the disk.
    assert sum(asked_for[: math.ceil(kept / CHUNK_BYTES)]) == kept
    assert sum(asked_for) == len(content)
    assert (tmp_path / "a.parquet").read_bytes() == content
    assert not list(tmp_path.glob(".part-*"))


def test_a_blob_that_changes_meanwhile_is_noticed(asked: Azurite, tmp_path: Path) -> None:
    asked.upload("changing", {"a.parquet": b"before"})
    blobs = azure.list_blobs("changing", "")
    asked.upload("changing", {"a.parquet": b"after!"})
    with pytest.raises(DataError, match=r"changing/a\.parquet was not downloaded: it was changed meanwhile"):
        azure.download_blobs("changing", blobs, tmp_path, 1)
    azure.download_blobs("changing", azure.list_blobs("changing", ""), tmp_path, 1)
    assert (tmp_path / "a.parquet").read_bytes() == b"after!"


def test_a_blob_that_is_not_what_its_md5_says_is_refused(asked: Azurite, tmp_path: Path) -> None:
    from azure.storage.blob import ContentSettings

    asked.upload("wrong", {"a.parquet": bytes(azure.RANGE_BYTES + 1)})
    client = asked.service.get_blob_client("wrong", "a.parquet")
    client.set_http_headers(ContentSettings(content_md5=bytearray(16)))
    with pytest.raises(DataError, match="came twice with bytes that do not match its checksum"):
        azure.download_blobs("wrong", azure.list_blobs("wrong", ""), tmp_path, 1)
    assert not (tmp_path / "a.parquet").exists()


def test_what_is_no_longer_in_the_container_is_not_taken_for_part_of_it(asked: Azurite, tmp_path: Path) -> None:
    asked.upload("shrinking", {"top/a.parquet": b"a", "top/b.parquet": b"b", "other/c.parquet": b"c"})
    azure.download_blobs("shrinking", azure.list_blobs("shrinking", ""), tmp_path, 1)
    asked.service.get_blob_client("shrinking", "top/b.parquet").delete_blob()
    azure.forget_others(tmp_path / "top", tmp_path, azure.list_blobs("shrinking", "top"))
    assert sorted(path.name for path in tmp_path.rglob("*.parquet")) == ["a.parquet", "c.parquet"]
    assert azure.downloaded_from(tmp_path / "top") == "nanochattest"


def test_one_file_makes_a_corpus_too(fetch: Callable[..., Result], tmp_path: Path) -> None:
    for mode in ("stream", "bulk"):
        result = fetch("private", "--prefix", "top/shard_00001.parquet", "--mode", mode, folder=mode)
        assert result.returncode == 0, result.stderr
    assert contents(tmp_path / "stream" / "base_data") == contents(tmp_path / "bulk" / "base_data")


WAYS_IN: dict[str, Callable[[Azurite], dict[str, str]]] = {
    "key": lambda store: {"AZURE_STORAGE_KEY": store.key},
    "token": lambda store: {"AZURE_STORAGE_SAS_TOKEN": "?" + store.signature("private")},
    "url": lambda store: {"AZURE_STORAGE_SAS_URL": f"{store.endpoint}/private?{store.signature('private')}"},
    "connection": lambda store: {
        "AZURE_STORAGE_CONNECTION_STRING": "DefaultEndpointsProtocol=http;AccountName=nanochattest;"
        f"AccountKey={store.key};BlobEndpoint={store.endpoint};"
    },
}


@pytest.mark.parametrize("way", WAYS_IN)
def test_every_kind_of_credentials_opens_it(
    asked: Azurite, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, way: str
) -> None:
    monkeypatch.delenv("AZURE_STORAGE_KEY")
    (name, value), *_ = WAYS_IN[way](asked).items()
    monkeypatch.setenv(name, "")
    file = tmp_path / "credentials"
    file.touch(mode=0o600)
    file.write_text(f"# mine\nexport {name}='{value}'\n")
    azure.read_credentials(file)
    assert [blob.name for blob in azure.list_blobs("private", "/top/")] == [
        f"top/shard_{index:05d}.parquet" for index in range(3)
    ]


def test_a_public_container_needs_no_credentials(asked: Azurite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_KEY")
    assert len(azure.list_blobs("public", "")) == 1


def test_credentials_that_others_can_read_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "credentials"
    file.write_text("AZURE_STORAGE_KEY=x\n")
    file.chmod(0o644)
    with pytest.raises(UsageError, match="may be read by others, and holds secrets — chmod 600 "):
        azure.read_credentials(file)
    file.chmod(0o600)
    file.write_text("STORAGE_KEY=secret\n")
    with pytest.raises(UsageError, match=":1 sets none of the known names — use AZURE_STORAGE_ACCOUNT, ") as refused:
        azure.read_credentials(file)
    assert "secret" not in str(refused.value)


Refusal = tuple[str, Callable[[Azurite], dict[str, str]], str]
REFUSALS: dict[str, Refusal] = {
    "wrong key": (
        "private",
        lambda store: {"AZURE_STORAGE_KEY": "c2VjcmV0"},
        "the service answered 403 (AuthorizationFailure) — it is not accepted: check the key",
    ),
    "malformed key": (
        "private",
        lambda store: {"AZURE_STORAGE_KEY": "secret!"},
        "AZURE_STORAGE_KEY is malformed — copy it again",
    ),
    "another account": (
        "private",
        lambda store: {**WAYS_IN["url"](store), "AZURE_STORAGE_ACCOUNT": "another"},
        "AZURE_STORAGE_SAS_URL is for the storage account 'nanochattest', not 'another' — leave out one of them",
    ),
    "expired": (
        "private",
        lambda store: {"AZURE_STORAGE_SAS_TOKEN": store.signature("private", hours=-1)},
        "the signature in AZURE_STORAGE_SAS_TOKEN has expired",
    ),
    "no list": (
        "private",
        lambda store: {"AZURE_STORAGE_SAS_TOKEN": store.signature("private", rights="r")},
        "(AuthorizationPermissionMismatch) — the signature or role must allow both read and list",
    ),
    "no container": (
        "missing",
        lambda store: {"AZURE_STORAGE_KEY": store.key},
        "missing/ was not listed: the service answered 404 (ContainerNotFound) — check --container and --account",
    ),
    "nothing": (
        "private",
        lambda store: {"AZURE_STORAGE_KEY": ""},
        "private is not public or not there, and this machine has no credentials for it — set AZURE_STORAGE_CONN",
    ),
    "nobody there": (
        "private",
        lambda store: {"AZURE_STORAGE_SERVICE_ENDPOINT": "http://127.0.0.1:9/none", "AZURE_STORAGE_KEY": store.key},
        "the storage account cannot be reached ([Errno 111] Connection refused) — check --account",
    ),
    "no account": (
        "private",
        lambda store: {"AZURE_STORAGE_SERVICE_ENDPOINT": "", "AZURE_STORAGE_ACCOUNT": "", "AZURE_STORAGE_KEY": "a" * 4},
        "the storage account is not named — give --account NAME, or set AZURE_STORAGE_ACCOUNT",
    ),
    "no files": (
        "empty",
        lambda store: {"AZURE_STORAGE_KEY": store.key},
        "empty has no .parquet files below its root — check --prefix",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_goes_wrong_is_one_line_without_secrets(store: Azurite, fetch: Callable[..., Result], case: str) -> None:
    container, environment, expected = REFUSALS[case]
    store.upload("empty", {"readme.txt": b""})
    started = time.monotonic()
    result = fetch(container, **environment(store))
    assert time.monotonic() - started < 60
    assert result.returncode in (ExitCode.FAILED, ExitCode.USAGE)
    (line,) = result.stderr.splitlines()
    assert expected in line
    assert "sig=" not in line
    for name, value in environment(store).items():
        assert name not in azure.SECRETS or not value or value not in line


def test_a_signature_on_the_command_line_is_refused_and_not_repeated(fetch: Callable[..., Result]) -> None:
    result = fetch("https://account.blob.core.windows.net/private?sp=rl&sig=c2VjcmV0")
    assert result.returncode == ExitCode.USAGE
    assert "put the address into AZURE_STORAGE_SAS_URL" in result.stderr
    assert "c2VjcmV0" not in result.stderr + result.stdout

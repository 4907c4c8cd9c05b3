"""Azurite, Microsoft's own emulator of Azure Blob Storage, on a free port of the loopback."""

import base64
import fcntl
import os
import re
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from azure.storage.blob import BlobServiceClient, ContainerSasPermissions, generate_container_sas

VERSION = "3.37.0"
ACCOUNT = "nanochattest"
START_SECONDS = 60


@dataclass(frozen=True)
class Azurite:
    """A running one."""

    endpoint: str
    key: str

    @property
    def service(self) -> BlobServiceClient:
        return BlobServiceClient(self.endpoint, credential={"account_name": ACCOUNT, "account_key": self.key})

    def upload(self, container: str, blobs: Mapping[str, bytes], *, public: bool = False, pieces: int = 0) -> None:
        """Make a container of blobs; with `pieces`, of so many bytes, they come without an MD5 of the whole."""
        client = self.service.get_container_client(container)
        if not client.exists():
            client.create_container(public_access="container" if public else None)
        for name, content in blobs.items():
            blob = client.get_blob_client(name)
            if not pieces:
                blob.upload_blob(content, overwrite=True)
                continue
            ids = [f"{start:08d}" for start in range(0, len(content), pieces)]
            for block in ids:
                blob.stage_block(block, content[int(block) : int(block) + pieces])
            blob.commit_block_list(ids)

    def signature(self, container: str, *, rights: str = "rl", hours: float = 1.0) -> str:
        """A SAS for a container."""
        return generate_container_sas(
            ACCOUNT,
            container,
            account_key=self.key,
            permission=ContainerSasPermissions.from_string(rights),
            expiry=datetime.now(UTC) + timedelta(hours=hours),
        )

    def environment(self, **more: str) -> dict[str, str]:
        """Which account to ask; the rest is up to the test."""
        return {"AZURE_STORAGE_SERVICE_ENDPOINT": self.endpoint, "AZURE_STORAGE_ACCOUNT": ACCOUNT, **more}


def _installed() -> Path:
    """The emulator's program, installed once per machine, outside of the checkout."""
    if shutil.which("npm") is None or shutil.which("node") is None:
        pytest.skip("Azurite takes node and npm, which are not here")
    cache = Path(os.environ.get("NANOCHAT_TEST_CACHE", Path.home() / ".cache" / "nanochat-test"))
    folder = cache / f"azurite-{VERSION}"
    program = folder / "node_modules" / ".bin" / "azurite-blob"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not program.exists():
            command = ["npm", "install", "--prefix", str(folder), "--no-audit", "--no-fund", "--fetch-retries=1"]
            done = subprocess.run([*command, f"azurite@{VERSION}"], capture_output=True, text=True, timeout=280)
            if done.returncode:
                pytest.skip(f"Azurite cannot be installed: {' '.join(done.stderr.split())[:200]}")
    return program


@contextmanager
def azurite(folder: Path) -> Iterator[Azurite]:
    """Run it while the context lasts."""
    program = _installed()
    key = base64.b64encode(secrets.token_bytes(64)).decode()
    said = folder.with_name(f"{folder.name}.log")
    arguments = ["--blobHost", "127.0.0.1", "--blobPort", "0", "--location", str(folder), "--silent"]
    with said.open("wb") as log:
        process = subprocess.Popen(
            [str(program), *arguments, "--skipApiVersionCheck", "--disableTelemetry"],
            env={**os.environ, "AZURITE_ACCOUNTS": f"{ACCOUNT}:{key}"},
            stdout=log,
        )
    try:
        until = time.monotonic() + START_SECONDS
        while (listens := re.search(r"listens on (http://127\.0\.0\.1:\d+)\n", said.read_text())) is None:
            assert process.poll() is None, "Azurite ended by itself"
            assert time.monotonic() < until, "Azurite did not start"
            time.sleep(0.05)
        yield Azurite(f"{listens[1]}/{ACCOUNT}", key)
    finally:
        process.terminate()
        process.wait()

"""Files come from the hub whole, checked and carried on; what goes wrong is one line that says what mends it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hub_server import COMMIT, HubServer, hub_server
from nanochat.corpus.fetch import PART_MARK
from nanochat.corpus.hub import download_file, hub_errors, hub_file_system, hub_token, open_repository
from nanochat.errors import DataError, NanochatError, UsageError

NAME = "owner/data"
BYTES = bytes(range(256)) * 12_288  # 3 MiB
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN", "HUGGINGFACE_TOKEN")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    root = tmp_path / "hub"
    (root / NAME / "data").mkdir(parents=True)
    (root / NAME / "data" / "large.bin").write_bytes(BYTES)
    (root / NAME / "README.md").write_bytes(b"# A card\n")
    for name in TOKENS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("NANOCHAT_RETRY_SECONDS", "2")
    with hub_server(root) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_large_and_small_files_come_checked_and_are_not_fetched_again(hub: HubServer, tmp_path: Path) -> None:
    for name in ("data/large.bin", "README.md"):
        path = download_file(NAME, name, "main", tmp_path / "here")
        assert path.read_bytes() == (hub.root / NAME / name).read_bytes()
    assert names(tmp_path / "here") == ["README.md", "data/large.bin"]
    sent = hub.bytes_sent
    download_file(NAME, "data/large.bin", "main", tmp_path / "here")
    assert hub.bytes_sent == sent


def test_a_revision_is_resolved_to_its_commit(hub: HubServer) -> None:
    assert open_repository(NAME).commit == COMMIT


def test_connections_cut_again_and_again_cost_no_byte_twice(hub: HubServer, tmp_path: Path) -> None:
    hub.cut_after = 1_000_000
    path = download_file(NAME, "data/large.bin", "main", tmp_path)
    assert path.read_bytes() == BYTES
    assert hub.bytes_sent == len(BYTES)


def test_a_server_without_ranges_is_read_from_the_start_again(hub: HubServer, tmp_path: Path) -> None:
    hub.cut_after, hub.knows_ranges = 1_000_000, False
    with pytest.raises(NanochatError, match="the connection was cut — run the same command again"):
        download_file(NAME, "data/large.bin", "main", tmp_path)
    hub.cut_after = None
    assert download_file(NAME, "data/large.bin", "main", tmp_path).read_bytes() == BYTES


def test_a_killed_download_is_carried_on_by_the_next_process(hub: HubServer, tmp_path: Path) -> None:
    hub.pause = 0.03
    call = f"download_file({NAME!r}, 'data/large.bin', 'main', Path({str(tmp_path)!r}))"
    code = f"from pathlib import Path; from nanochat.corpus.hub import download_file; {call}"
    process = subprocess.Popen([sys.executable, "-c", code], env=dict(os.environ))
    while hub.bytes_sent < 2_000_000:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (part,) = tmp_path.glob(f"data/{PART_MARK}*")
    kept, hub.pause = part.stat().st_size, 0.0
    assert 0 < kept < len(BYTES)
    time.sleep(0.2)
    hub.bytes_sent = 0
    assert download_file(NAME, "data/large.bin", "main", tmp_path).read_bytes() == BYTES
    assert hub.bytes_sent == len(BYTES) - kept
    assert names(tmp_path / "data") == ["large.bin"]


@pytest.mark.parametrize("name", ["data/large.bin", "README.md"])
def test_a_flipped_byte_is_refused_and_fetched_again(hub: HubServer, tmp_path: Path, name: str) -> None:
    hub.flips = 1
    assert download_file(NAME, name, "main", tmp_path).read_bytes() == (hub.root / NAME / name).read_bytes()
    hub.flips = 2
    with pytest.raises(DataError, match=f"{NAME}/{name} came twice with bytes that do not match its checksum"):
        download_file(NAME, name, "main", tmp_path / "again")
    assert names(tmp_path / "again") == []


def test_a_part_of_another_version_is_not_carried_on(hub: HubServer, tmp_path: Path) -> None:
    hub.cut_after = 100
    hub.lose_after = 2
    with pytest.raises(NanochatError):
        download_file(NAME, "data/large.bin", "main", tmp_path)
    assert len(names(tmp_path / "data")) == 1
    hub.cut_after = hub.lose_after = None
    (hub.root / NAME / "data" / "large.bin").write_bytes(BYTES[::-1])
    assert download_file(NAME, "data/large.bin", "main", tmp_path).read_bytes() == BYTES[::-1]
    assert names(tmp_path / "data") == ["large.bin"]


def test_several_who_want_one_file_fetch_it_once(hub: HubServer, tmp_path: Path) -> None:
    hub.pause = 0.002
    repository = open_repository(NAME)
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(download_file, NAME, "data/large.bin", repository.commit, tmp_path) for _ in range(4)]
        assert {future.result().read_bytes() for future in futures} == {BYTES}
    assert hub.bytes_sent == len(BYTES)


@pytest.mark.parametrize(
    ("status", "headers", "token", "fix"),
    [
        (401, {}, "", "if it is private, set HF_TOKEN"),
        (401, {}, "hf_secret", "the token in HF_TOKEN is not accepted"),
        (401, {"X-Error-Code": "GatedRepo"}, "", "ask for access on "),
        (403, {}, "hf_secret", "ask for access on "),
        (404, {}, "", "check HF_ENDPOINT, the name and --revision"),
        (429, {}, "", "wait some minutes and run the same command again, with HF_TOKEN set"),
        (503, {}, "", "run the same command again later"),
    ],
)
def test_each_refusal_is_one_line_with_its_fix(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, status: int, headers: dict[str, str], token: str, fix: str
) -> None:
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    hub.refuse_with, hub.refuse_headers = status, headers
    with pytest.raises(NanochatError) as refused:
        open_repository(NAME)
    text = str(refused.value)
    assert text.startswith(f"{NAME} at main was not downloaded: the server answered {status} — ")
    assert fix in text
    assert "\n" not in text
    assert "hf_secret" not in text


def test_the_hub_library_raises_the_same_lines(hub: HubServer) -> None:
    hub.refuse_with = 403
    with (
        pytest.raises(NanochatError, match=r"^it failed: the server answered 403 — ask for access on "),
        hub_errors("it failed", NAME),
    ):
        hub_file_system().ls(f"datasets/{NAME}")


def test_a_dead_endpoint_is_one_line(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        NanochatError, match=r"127\.0\.0\.1:9 cannot be reached \(.*refused\) — .*mirror in HF_ENDPOINT"
    ):
        open_repository(NAME)


def test_offline_mode_and_another_server_are_said(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(NanochatError, match="HF_HUB_OFFLINE is set — unset HF_HUB_OFFLINE"):
        open_repository(NAME)
    assert hub.requests == []
    monkeypatch.delenv("HF_HUB_OFFLINE")
    page = hub.root / "api" / "datasets" / NAME / "revision" / "main"
    page.parent.mkdir(parents=True)
    page.write_text("<html>Log in to the network</html>")
    monkeypatch.setenv("HF_ENDPOINT", f"{hub.endpoint}/files/")
    with pytest.raises(NanochatError, match="does not answer as the hub does — check HF_ENDPOINT"):
        open_repository(NAME)


def test_a_name_that_leads_elsewhere_is_refused(hub: HubServer, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a data set's name"):
        open_repository("../data")
    with pytest.raises(DataError, match="could lead out of"):
        download_file(NAME, "../large.bin", "main", tmp_path)
    with pytest.raises(DataError, match=r"has no file missing\.bin"):
        download_file(NAME, "missing.bin", "main", tmp_path)


def test_the_token_goes_to_the_hub_under_any_of_its_names(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hub_token() is None
    monkeypatch.setenv("HUGGINGFACE_HUB_TOKEN", "hf_old")
    open_repository(NAME)
    assert hub.tokens[-1] == "Bearer hf_old"
    assert "set HF_TOKEN instead" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", "hf_new")
    open_repository(NAME)
    assert hub.tokens[-1] == "Bearer hf_new"
    assert capsys.readouterr().err == ""


def test_the_token_does_not_go_to_the_storage_behind_the_hub(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with hub_server(hub.root) as storage:
        hub.storage = storage.endpoint
        assert download_file(NAME, "data/large.bin", "main", tmp_path).read_bytes() == BYTES
        assert storage.tokens == [None]
        assert hub.tokens == ["Bearer hf_secret"] * 2

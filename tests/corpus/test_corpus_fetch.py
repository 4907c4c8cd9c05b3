"""What all downloads share: they stop together, wait as long as is sensible, and stay in their folder."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hub_server import HubServer, hub_server
from nanochat.corpus import fetch as fetching
from nanochat.corpus.fetch import Advance, LostError, Patience, Remote, fetch, in_parallel, path_inside, url_remote
from nanochat.errors import DataError, NanochatError, UsageError


@pytest.fixture
def server(tmp_path: Path) -> Iterator[HubServer]:
    root = tmp_path / "files"
    root.mkdir()
    (root / "a").write_bytes(b"content")
    with hub_server(root) as running:
        yield running


def test_the_first_failure_ends_the_others_at_their_next_byte() -> None:
    ended = []

    def work(item: int, advance: Advance) -> None:
        if item == 0:
            raise UsageError("no")
        try:
            while True:
                advance(1)
                time.sleep(0.001)
        finally:
            ended.append(item)

    with pytest.raises(UsageError, match="no"):
        list(in_parallel(work, range(4), 4))
    assert sorted(ended) == [1, 2, 3]


def test_results_come_from_all_items_and_bytes_are_counted() -> None:
    counted: list[int] = []

    def work(item: int, advance: Advance) -> int:
        advance(item)
        return 2 * item

    assert sorted(in_parallel(work, range(9), 3, counted.append)) == [2 * item for item in range(9)]
    assert sum(counted) == sum(range(9))


def test_a_file_at_an_address_comes_checked_if_its_checksum_is_known(server: HubServer, tmp_path: Path) -> None:
    address = f"{server.endpoint}/files/a"
    fetch(url_remote(address, "a"), tmp_path / "here")
    assert (tmp_path / "here").read_bytes() == b"content"
    with pytest.raises(DataError, match="a came twice with bytes that do not match its checksum"):
        fetch(url_remote(address, "a", "0" * 64), tmp_path / "checked")
    with pytest.raises(NanochatError, match="the server answered 404 — check the address"):
        url_remote(f"{server.endpoint}/files/b", "b")


def test_a_server_that_asks_for_time_gets_it(server: HubServer) -> None:
    server.refuse_with, server.refuse_headers = 503, {"Retry-After": "60"}
    with pytest.raises(NanochatError, match="the server answered 503 — run the same command again later"):
        url_remote(f"{server.endpoint}/files/a", "a")
    # It is not asked again before it wants to be, and nobody waits a minute for a first answer.
    assert len(server.requests) == 1


def test_a_server_that_was_lost_is_asked_less_and_less_often_until_patience_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, asked = [0.0], []
    passes = SimpleNamespace(monotonic=lambda: clock[-1], sleep=lambda seconds: clock.append(clock[-1] + seconds))
    monkeypatch.setattr(fetching, "time", passes)
    patience = Patience(100.0)
    patience.renew()

    def ask_for_ever() -> None:
        while True:
            asked.append(clock[-1])
            patience.wait(LostError("lost", "again"))

    with pytest.raises(LostError):
        ask_for_ever()
    assert asked == [0, 0.5, 1.5, 3.5, 7.5, 15.5, 31.5, 61.5, 91.5]


def test_a_wrong_patience_is_said(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_RETRY_SECONDS", "long")
    with pytest.raises(UsageError, match="NANOCHAT_RETRY_SECONDS is 'long', not a number of seconds — unset it"):
        fetch(url_remote(f"{server.endpoint}/files/a", "a"), tmp_path / "here")


def test_more_than_was_announced_is_refused(tmp_path: Path) -> None:
    @contextmanager
    def read(start: int) -> Iterator[Iterator[bytes]]:
        yield iter([b"more than that"])

    with pytest.raises(DataError, match="it has more than its 4 bytes"):
        fetch(Remote("it", 4, "1", read), tmp_path / "it")
    assert list(tmp_path.iterdir()) == []


@given(st.text(alphabet="ab./\\", max_size=12))
def test_no_name_leads_out_of_its_folder(name: str) -> None:
    folder = Path("/folder")
    try:
        path = path_inside(folder, name)
    except DataError:
        return
    assert Path(*[part for part in path.parts if part != ".."]) == path
    assert path.is_relative_to(folder)
    assert path != folder

"""Compression is measured as promised, beside peers that are on disk, and never over the network."""

import base64
import hashlib
import json
import socket
from pathlib import Path
from typing import NoReturn

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.tokenizer import Tokenizer
from nanochat.tokenizer.evaluate import (
    PEERS,
    SAMPLES,
    CompressionRow,
    PeerTokenizer,
    as_json,
    evaluate_tokenizer,
    load_peer,
    render,
    tiktoken_cache,
)

URL = "https://example.org/peer.tiktoken"


def cached_peer(cache: Path) -> PeerTokenizer:
    """A peer of 256 single bytes and the pair `th`, put where tiktoken would have put it."""
    tokens = [bytes([value]) for value in range(256)] + [b"th"]
    content = b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))
    (cache / hashlib.sha1(URL.encode()).hexdigest()).write_bytes(content)
    return PeerTokenizer("peer", URL, hashlib.sha256(content).hexdigest(), r"\w+|\W+")


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    return tmp_path


def test_without_peers_on_disk_the_table_says_so_and_no_connection_is_tried(
    tokenizer: Tokenizer, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> NoReturn:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    rows = evaluate_tokenizer(tokenizer, SAMPLES)
    assert [row.sample for row in rows] == list(SAMPLES)
    assert all(row.bytes_per_token[peer.name] is None for row in rows for peer in PEERS)
    assert render(rows).count("not on disk") == len(SAMPLES) * len(PEERS)
    assert list(empty_cache.iterdir()) == []


@settings(max_examples=50, deadline=None)
@given(text=st.text(min_size=1))
def test_a_tokenizer_of_single_bytes_has_exactly_one_byte_per_token(bytes_only: Tokenizer, text: str) -> None:
    (row,) = evaluate_tokenizer(bytes_only, {"any": text})
    assert row.bytes_per_token["nanochat"] == 1.0
    assert row.num_bytes == len(text.encode())


def test_training_on_text_compresses_every_kind_of_it(tokenizer: Tokenizer, empty_cache: Path) -> None:
    ratios = [row.bytes_per_token["nanochat"] for row in evaluate_tokenizer(tokenizer, SAMPLES)]
    assert all(ratio is not None and ratio > 1.0 for ratio in ratios)


def test_an_empty_sample_has_no_ratio_and_no_row(tokenizer: Tokenizer, empty_cache: Path) -> None:
    assert [row.sample for row in evaluate_tokenizer(tokenizer, {"empty": "", "full": "x"})] == ["full"]


def test_a_peer_whose_file_matches_its_checksum_is_read_from_the_cache(tmp_path: Path) -> None:
    encoding = load_peer(cached_peer(tmp_path), tmp_path)
    assert encoding is not None
    assert encoding.encode_ordinary("the") == [256, ord("e")]


def test_a_peer_whose_file_is_missing_or_changed_counts_as_absent_and_is_left_alone(tmp_path: Path) -> None:
    peer = cached_peer(tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes() + b"Li4= 257\n")
    assert load_peer(peer, tmp_path) is None
    assert file.exists()
    file.unlink()
    assert load_peer(peer, tmp_path) is None
    assert load_peer(peer, None) is None


def test_the_cache_is_looked_for_where_tiktoken_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA_GYM_CACHE_DIR", "/older")
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    assert tiktoken_cache() == Path("/older")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "/newer")
    assert tiktoken_cache() == Path("/newer")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    assert tiktoken_cache() is None


def test_the_published_patterns_compile(tmp_path: Path) -> None:
    ranks = cached_peer(tmp_path)
    for peer in PEERS:
        local = PeerTokenizer(peer.name, ranks.url, ranks.sha256, peer.pattern)
        encoding = load_peer(local, tmp_path)
        assert encoding is not None
        assert encoding.decode(encoding.encode_ordinary("It's 2024, isn't it?\n")) == "It's 2024, isn't it?\n"


def test_the_table_is_aligned_and_the_json_is_json() -> None:
    rows = [
        CompressionRow("prose", 12345, {"nanochat": 4.5, "GPT-2": None}),
        CompressionRow("a longer kind of text", 6, {"nanochat": 1.0, "GPT-2": 10.25}),
    ]
    lines = render(rows).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[2] == "| prose                 | 12,345 |     4.50 | not on disk |"
    assert json.loads(json.dumps(as_json(rows)))[1]["bytes_per_token"] == {"nanochat": 1.0, "GPT-2": 10.25}

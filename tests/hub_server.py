"""A hub of one's own on the loopback: as much of the Hugging Face Hub's interface as downloading a data set takes."""

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

COMMIT = "c0ffee" + "0" * 34
PIECE = 1 << 16


class HubServer(ThreadingHTTPServer):
    """Serves `root/OWNER/NAME/…` as data sets, and everything below `root` under `/files/`.

    Attributes:
        requests: method and path of each request.
        tokens: what came as authorization.
        bytes_sent: of files.
        refuse_with: a status that answers everything; 0 for none.
        refuse_headers: sent with it.
        lose_after: how many requests are answered before the connection is lost; `None` for all.
        cut_after: how many bytes of a file come before the connection is cut; `None` for all.
        flips: how many more files come with one byte flipped.
        pause: seconds between pieces of PIECE bytes.
        knows_ranges: whether it heeds Range.
        storage: the endpoint of another server of the same files, to which it sends those who ask for one.
    """

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        self.root = root
        self.requests: list[str] = []
        self.tokens: list[str | None] = []
        self.bytes_sent = 0
        self.refuse_with = 0
        self.refuse_headers: dict[str, str] = {}
        self.lose_after: int | None = None
        self.cut_after: int | None = None
        self.flips = 0
        self.pause = 0.0
        self.knows_ranges = True
        self.storage = ""
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is nothing to report."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        self.server.tokens.append(self.headers.get("Authorization"))
        if self.server.lose_after is not None and len(self.server.requests) > self.server.lose_after:
            self.close_connection = True
            return
        path = self.path.partition("?")[0]
        if self.server.refuse_with:
            self._answer({"error": "refused"}, self.server.refuse_with, self.server.refuse_headers)
        elif found := re.fullmatch(r"/api/datasets/([\w-]+/[\w-]+)(/revision/\w+|/tree/\w+)?", path):
            self._describe(self.server.root / found[1], is_tree="/tree/" in path)
        elif found := re.fullmatch(r"/api/datasets/([\w-]+/[\w-]+)/tree/\w+/(.+)", path):
            repository = self.server.root / found[1]
            inside = sorted(path for path in (repository / unquote(found[2])).iterdir() if path.is_file())
            self._answer([_tree_entry(path, repository) for path in inside])
        elif found := re.fullmatch(r"/datasets/([\w-]+/[\w-]+)/resolve/\w+/(.+)", path):
            if self.server.storage:
                self._answer({}, 302, {"Location": f"{self.server.storage}/files/{found[1]}/{found[2]}"})
            else:
                self._send(self.server.root / found[1] / found[2])
        elif found := re.fullmatch(r"/files/(.+)", path):
            self._send(self.server.root / found[1])
        else:
            self._answer({"error": "Not found"}, 404)

    def do_HEAD(self) -> None:
        self.do_GET()

    def _describe(self, repository: Path, is_tree: bool) -> None:
        files = sorted(path for path in repository.rglob("*") if path.is_file())
        if not files:
            self._answer({"error": "Repository not found"}, 401)
        elif is_tree:
            self._answer([_tree_entry(path, repository) for path in files])
        else:
            siblings = [_sibling(path, repository) for path in files]
            self._answer({"id": "/".join(repository.parts[-2:]), "sha": COMMIT, "siblings": siblings})

    def _send(self, path: Path) -> None:
        if not path.is_file():
            self._answer({"error": "Entry not found"}, 404)
            return
        content = path.read_bytes()
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and self.server.knows_ranges:
            first, size = int(asked[1]), len(content)
            content = content[first : int(asked[2]) + 1 if asked[2] else None]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{first + len(content) - 1}/{size}")
        else:
            self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", etag)
        with self.server.lock:
            if self.server.flips and self.command == "GET":
                self.server.flips -= 1
                content = bytes([content[0] ^ 1]) + content[1:]
        self._end(content)

    def _answer(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self._end(json.dumps(value).encode(), is_file=False)

    def _end(self, content: bytes, is_file: bool = True) -> None:
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if not is_file:
            self.wfile.write(content)
            return
        if self.server.cut_after is not None and self.server.cut_after < len(content):
            content = content[: self.server.cut_after]
            self.close_connection = True
        for start in range(0, len(content), PIECE):
            piece = content[start : start + PIECE]
            self.wfile.write(piece)
            with self.server.lock:
                self.server.bytes_sent += len(piece)
            if self.server.pause:
                time.sleep(self.server.pause)


def _is_large(path: Path) -> bool:
    """Whether git keeps only a pointer to it, as it does with data."""
    return path.suffix != ".md"


def _sibling(path: Path, repository: Path) -> dict[str, Any]:
    content = path.read_bytes()
    blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest()
    entry = {"rfilename": path.relative_to(repository).as_posix(), "size": len(content), "blobId": blob}
    if _is_large(path):
        entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry


def _tree_entry(path: Path, repository: Path) -> dict[str, Any]:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    name, size = path.relative_to(repository).as_posix(), path.stat().st_size
    lfs = {"oid": digest, "size": size, "pointerSize": 134}
    return {"type": "file", "path": name, "oid": digest[:40], "size": size, "lfs": lfs}


@contextmanager
def hub_server(root: Path) -> Iterator[HubServer]:
    """Serve `root` while the context lasts."""
    with HubServer(root) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()

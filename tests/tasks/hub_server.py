"""A hub of one's own on the loopback: as much of the Hugging Face Hub's interface as downloading a data set takes."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "c0ffee" + "0" * 34


class HubServer(ThreadingHTTPServer):
    """Serves `root/OWNER/NAME/…` as data sets.

    Attributes:
        requests: method and path of each request.
        refuse_with: a status that answers everything; 0 for none.
        lose_after: how many requests are answered before the connection is lost; `None` for all.
    """

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        self.root = root
        self.requests: list[str] = []
        self.refuse_with = 0
        self.lose_after: int | None = None
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        if self.server.lose_after is not None and len(self.server.requests) > self.server.lose_after:
            self.close_connection = True
            return
        path = self.path.partition("?")[0]
        if self.server.refuse_with:
            self._answer({"error": "refused"}, self.server.refuse_with)
        elif found := re.fullmatch(r"/api/datasets/(\w+/[\w-]+)(/revision/\w+|/tree/\w+)?", path):
            self._describe(self.server.root / found[1], is_tree="/tree/" in path)
        elif found := re.fullmatch(r"/datasets/(\w+/[\w-]+)/resolve/\w+/(.+)", path):
            self._send(self.server.root / found[1] / found[2])
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
            siblings = [{"rfilename": path.relative_to(repository).as_posix()} for path in files]
            self._answer({"id": "/".join(repository.parts[-2:]), "sha": COMMIT, "siblings": siblings})

    def _send(self, path: Path) -> None:
        content = path.read_bytes()
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self._end(content)

    def _answer(self, value: Any, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self._end(json.dumps(value).encode())

    def _end(self, content: bytes) -> None:
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


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

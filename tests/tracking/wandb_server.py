"""A W&B server on this machine, as far as wandb 0.31 needs one to sync a run, to resume it, and to record it online.

Rows, console lines and system metrics are kept by the place the client sends them to, as the real server does. What the
client may ask beside that is answered with nothing, which it accepts.
"""

import gzip
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "0123456789abcdef0123456789abcdef01234567"
ENTITY = "somebody"
STREAM = re.compile(r"/files/([^/]+)/([^/]+)/([^/]+)/file_stream")
UPLOAD = re.compile(r"/upload/([^/]+)/([^/]+)/(.+)")


@dataclass
class Run:
    """What the server has of one run."""

    fields: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    streams: dict[str, dict[int, str]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    exit_code: int | None = None

    def stream(self, name: str) -> list[str]:
        lines = self.streams.get(name, {})
        return [lines[place] for place in sorted(lines)]

    @property
    def history(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.stream("wandb-history.jsonl")]

    @property
    def console(self) -> str:
        return "".join(self.stream("output.log"))

    def resume_status(self) -> dict[str, Any]:
        history, events = self.stream("wandb-history.jsonl"), self.stream("wandb-events.jsonl")
        return {
            "id": "1",
            "name": "1",
            "displayName": self.fields.get("displayName"),
            "summaryMetrics": "{}",
            "historyLineCount": len(history),
            "historyTail": json.dumps(history[-1:]),
            "eventsLineCount": len(events),
            "eventsTail": json.dumps(events[-1:]),
            "logLineCount": len(self.stream("output.log")),
            "config": json.dumps(self.config),
            "tags": self.fields.get("tags") or [],
            "wandbConfig": '{"t": 1}',
        }


class WandbServer(ThreadingHTTPServer):
    """Runs by project and id; `refuse` maps an operation of the protocol to the status it is refused with."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.runs: dict[tuple[str, str], Run] = {}
        self.refuse: dict[str, int] = {}
        self.lock = threading.RLock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WandbServer

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            data = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data

    def answer(self, content: Any, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self.answer({})

    def do_PUT(self) -> None:
        data = self.body()
        if match := UPLOAD.fullmatch(self.path):
            project, run_id, name = match.groups()
            with self.server.lock:
                self.server.runs[project, run_id].files[name] = data
        self.answer({})

    def do_POST(self) -> None:
        data = self.body()
        if self.path.startswith("/graphql"):
            content = json.loads(data)
            with self.server.lock:
                self.graphql(content.get("query", ""), content.get("variables") or {})
        elif match := STREAM.fullmatch(self.path):
            with self.server.lock:
                self.file_stream(self.server.runs[match[2], match[3]], json.loads(data))
        else:
            self.answer({}, 404)

    def file_stream(self, run: Run, content: dict[str, Any]) -> None:
        if status := self.server.refuse.get("file_stream"):
            return self.answer({"error": "refused"}, status)
        for name, part in (content.get("files") or {}).items():
            lines = run.streams.setdefault(name, {})
            lines |= {part.get("offset", 0) + place: line for place, line in enumerate(part["content"])}
        if content.get("complete"):
            run.exit_code = content.get("exitcode")
        return self.answer({"limits": {}})

    def graphql(self, query: str, variables: dict[str, Any]) -> None:
        match = re.search(r"(?:query|mutation)\s+(\w+)", query)
        operation = match[1] if match else ""
        if not self.headers.get("Authorization"):
            return self.answer({"errors": [{"message": "no key"}]}, 401)
        if status := self.server.refuse.get(operation):
            return self.answer({"errors": [{"message": "refused"}]}, status)
        project = {"id": "1", "name": variables.get("project"), "entity": {"id": "1", "name": ENTITY}}
        place = (variables.get("project") or "", variables.get("name") or "")
        data: dict[str, Any] = {}
        if "upsertBucket" in query:
            new = place not in self.server.runs
            run = self.server.runs.setdefault(place, Run())
            run.fields |= {name: value for name, value in variables.items() if value is not None}
            run.config |= json.loads(variables.get("config") or "{}")
            bucket = {"id": "1", "name": place[1], "displayName": run.fields.get("displayName"), "project": project}
            bucket |= {"description": None, "config": "{}", "sweepName": None}
            bucket["historyLineCount"] = len(run.stream("wandb-history.jsonl"))
            data = {"upsertBucket": {"bucket": bucket, "inserted": new}}
        elif operation == "RunResumeStatus":
            run = self.server.runs.get(place)
            data = {"model": {**project, "bucket": run.resume_status() if run else None}}
        elif "createRunFiles" in query:
            to = f"{self.server.url}/upload/{variables['project']}/{variables['run']}"
            files = [{"name": name, "uploadUrl": f"{to}/{name}"} for name in variables["files"]]
            data = {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}
        elif "viewer" in query.lower():
            nobody = {"admin": False, "flags": "{}", "teams": {"edges": []}, "apiKeys": {"edges": []}}
            viewer = {"id": "1", "entity": ENTITY, "username": ENTITY, "email": "", **nobody}
            data = {"viewer": viewer, "serverInfo": {"cliVersionInfo": {}, "features": []}}
        elif "serverInfo" in query:
            data = {"serverInfo": {"cliVersionInfo": {}, "features": []}}
        return self.answer({"data": data})


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    """A server that runs while the block does."""
    with WandbServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()

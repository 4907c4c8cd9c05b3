"""`nanochat sync`: bring runs that were recorded offline to W&B's server, once, and see that they arrived.

W&B's own `wandb sync` does the sending, of a segment that `merge` has made. It is not trusted: it returns 0 and leaves
its mark even where the server refused every row. So the server is asked before, which decides what is sent, and asked
again after.
"""

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nanochat.errors import NanochatError, UsageError
from nanochat.files import write_json
from nanochat.tracking.merge import Merged, Source, merge
from nanochat.tracking.runs import (
    METRICS_NAME,
    RunRecord,
    is_synced,
    last_written,
    mark_of,
    segments_of,
    segments_of_record,
    stage_folders,
)
from nanochat.tracking.transaction_log import read_log, write_log
from nanochat.tracking.wandb_key import base_url, check_key, find_key
from nanochat.workspace import Workspace

REQUEST_SECONDS = 20.0
# W&B's server counts rows a little after it took them.
SECONDS_TO_ARRIVE = 60.0
# `wandb sync` retries for 16 minutes and more where it cannot get through.
LEAST_UPLOAD_SECONDS = 120.0
RECORDS_PER_SECOND = 50.0

# The fields are those that W&B's client itself asks for before it resumes a run.
QUERY = """
query RunResumeStatus($project: String, $entity: String, $name: String!) {
  model(name: $project, entityName: $entity) {
    bucket(name: $name, missingOk: true) { historyLineCount historyTail logLineCount eventsLineCount }
  }
}
"""


@dataclass(frozen=True)
class OnServer:
    """What a server has of one run.

    Attributes:
        rows: of metrics.
        last_step: of the newest row, -1 without rows.
        lines: of console.
        stats: system metrics.
    """

    rows: int = 0
    last_step: int = -1
    lines: int = 0
    stats: int = 0


@dataclass(frozen=True)
class Outcome:
    """What became of one run.

    Attributes:
        run_id: W&B's id.
        state: `sent`; `there` already; `would send`; `skipped` as it is being written; or `failed`.
        text: what happened, for a person.
    """

    run_id: str
    state: Literal["sent", "there", "would send", "skipped", "failed"]
    text: str


class Server:
    """W&B's server, asked over its public GraphQL interface, each question with a time limit.

    Args:
        url: its address.
        key: W&B's key.
    """

    def __init__(self, url: str, key: str) -> None:
        self.url = url
        self._authorization = "Basic " + base64.b64encode(f"api:{key}".encode()).decode()

    @classmethod
    def from_environment(cls) -> "Server":
        """The server and the key as W&B would find them.

        Raises:
            UsageError: there is no key, or none that could be one.
        """
        key = find_key()
        if key is None:
            raise UsageError("there is no W&B key", "wandb login, or put WANDB_API_KEY=… into .env (chmod 600 .env)")
        check_key(key)
        os.environ["WANDB_API_KEY"] = key.value
        return cls(base_url(), key.value)

    def look_up(self, entity: str, project: str, run_id: str) -> OnServer:
        """What it has of a run.

        Raises:
            NanochatError: it does not answer, or refuses.
        """
        variables = {"entity": entity or None, "project": project, "name": run_id}
        body = json.dumps({"operationName": "RunResumeStatus", "query": QUERY, "variables": variables}).encode()
        headers = {"Authorization": self._authorization, "Content-Type": "application/json"}
        try:
            request = urllib.request.Request(f"{self.url}/graphql", body, headers)
            with urllib.request.urlopen(request, timeout=REQUEST_SECONDS) as answer:
                content = json.load(answer)
            if content.get("errors"):
                raise NanochatError(f"{self.url} refuses ({content['errors'][0].get('message')})", "see: wandb status")
            found = ((content["data"] or {}).get("model") or {}).get("bucket")
            if not found:
                return OnServer()
            rows = int(found["historyLineCount"])
            # Without it every row would be sent again, so that its absence is an error.
            last_step = int(json.loads(json.loads(found["historyTail"])[-1])["_step"]) if rows else -1
            return OnServer(rows, last_step, found["logLineCount"], found["eventsLineCount"])
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):
                raise NanochatError(f"{self.url} does not accept the key", "wandb login --relogin") from None
            raise NanochatError(f"{self.url} answers {error.code} {error.reason}", "try again later") from None
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise NanochatError(f"{self.url} does not answer as W&B does ({error!r})", "check WANDB_BASE_URL") from None
        except OSError as error:
            raise NanochatError(
                f"{self.url} does not answer ({error})", "run it where there is internet, a login node for example"
            ) from None


def find_sources(workspace: Workspace, named: tuple[str, ...]) -> list[Source]:
    """The runs to look at: all of a workspace, or those named, or those below a path of W&B's folders.

    Raises:
        UsageError: a name is neither a run nor a folder with W&B's runs.
    """
    if not named:
        ours = [_source_of(folder, workspace) for folder in stage_folders(workspace)]
        known = {source.run_id for source in ours}
        folder = Path(os.environ.get("WANDB_DIR") or workspace.wandb)
        return ours + [source for source in _below(folder) if source.run_id not in known]
    sources = []
    for name in named:
        found = [] if "/" in name or name.startswith(".") else list(stage_folders(workspace, name))
        below = [_source_of(folder, workspace) for folder in found] or list(_below(Path(name)))
        if not below:
            raise UsageError(f"{name!r} is neither a tracked run nor a folder of W&B's runs", "see: nanochat runs")
        sources += below
    return sources


def _source_of(folder: Path, workspace: Workspace) -> Source:
    record = RunRecord.read(folder)
    segments = segments_of_record(record, workspace)
    return Source(record.names.id, tuple(segments), folder / METRICS_NAME, record)


def _below(folder: Path) -> Iterator[Source]:
    """The runs in a folder `wandb`, in one that has such a folder, or of one run folder."""
    places: dict[Path, tuple[Path, ...]] = {}
    if list(folder.glob("run-*.wandb")):
        places[folder.resolve().parents[1]] = (folder,)
    for root in (folder, folder.resolve().parent):
        if not places and (root / "wandb").is_dir() and (root == folder or folder.name == "wandb"):
            places = {root: tuple((root / "wandb").glob("*run-*"))}
    for root, run_folders in places.items():
        logs = {path for run_folder in run_folders for path in run_folder.glob("run-*.wandb")}
        for run_id in sorted({path.stem.removeprefix("run-") for path in logs}):
            yield Source(run_id, tuple(segments_of(root, run_id)) or tuple(sorted(logs)))


def sync(
    sources: list[Source],
    *,
    server: Server | None,
    quiet_seconds: float,
    report: Callable[[Outcome], None],
    arrive_seconds: float = SECONDS_TO_ARRIVE,
) -> list[Outcome]:
    """Bring every run to the server that is not there yet; one that fails does not keep the others.

    Args:
        sources: the runs.
        server: where to; None to say only what would be done.
        quiet_seconds: a run without an end counts as dead if nothing was written to it for so long.
        report: called with each outcome as it is known.
        arrive_seconds: how long the server may take to count what it was sent.
    """
    outcomes = []
    for source in sources:
        try:
            outcome = _sync_one(source, server, quiet_seconds, arrive_seconds)
        except NanochatError as error:
            outcome = Outcome(source.run_id, "failed", str(error))
        outcomes.append(outcome)
        report(outcome)
    return outcomes


def _sync_one(source: Source, server: Server | None, quiet_seconds: float, arrive_seconds: float) -> Outcome:
    if not source.segments and source.record is not None and source.record.wandb_folder is None:
        return Outcome(source.run_id, "skipped", "W&B was disabled")
    if is_synced(source.segments, source.metrics):
        return Outcome(source.run_id, "there", "nothing new since it was synced")
    if is_being_written(source, quiet_seconds):
        return Outcome(source.run_id, "skipped", "still being written")
    merged = merge(source)
    if server is None:
        return Outcome(source.run_id, "would send", f"{len(merged.rows)} rows, as far as they are not there yet")

    before = server.look_up(merged.entity, merged.project, source.run_id)
    missing = [step for step in merged.rows if step > before.last_step]
    expected = before.rows + len(missing)
    if missing or before.rows == 0:
        records = merged.records(
            after_step=before.last_step,
            num_lines=before.lines,
            num_stats=before.stats,
            sent=[path for path in source.segments if before.rows and mark_of(path).exists()],
        )
        _upload(source, merged, records)
        problem = _arrival_problem(server, merged, expected, arrive_seconds)
        if problem:
            return Outcome(source.run_id, "failed", problem)
    for path in source.segments:
        write_json(mark_of(path), {"rows": expected, "step": max(merged.rows, default=-1), "server": server.url})
    twice = expected - len(merged.rows)
    note = f"; {twice} of them more than the run has, of an upload by other means" if twice > 0 else ""
    text = f"{len(missing)} rows sent, {expected} are there{note}"
    return Outcome(source.run_id, "sent" if missing else "there", text)


def is_being_written(source: Source, quiet_seconds: float) -> bool:
    """Whether a process seems to be at it: the newest segment has no end, and something was written lately."""
    if source.record is not None and source.record.state != "running":
        return False
    if source.segments and any(record.HasField("exit") for record in read_log(source.segments[-1])[-3:]):
        return False
    return time.time() - last_written(source.segments, source.metrics) < quiet_seconds


def _upload(source: Source, merged: Merged, records: list[Any]) -> None:
    """Let `wandb sync` send a segment, in a process that ends when its time is over.

    Raises:
        NanochatError: it took too long or said that it failed.
    """
    seconds = LEAST_UPLOAD_SECONDS + len(records) / RECORDS_PER_SECOND
    with tempfile.TemporaryDirectory(prefix="nanochat-sync-") as place:
        folder = Path(place) / "wandb" / f"offline-run-{time.strftime('%Y%m%d_%H%M%S')}-{merged.run_id}"
        for path in source.segments:
            if (path.parent / "files").is_dir():
                shutil.copytree(path.parent / "files", folder / "files", dirs_exist_ok=True)
        log = folder / f"run-{merged.run_id}.wandb"
        write_log(log, records)
        environment = {
            **os.environ,
            "WANDB_ERROR_REPORTING": "false",
            "WANDB_BASE_URL": base_url(),
            "WANDB_CACHE_DIR": place,
            "WANDB_SILENT": "false",
        }
        # In a session of its own, as wandb starts a process that must end with it.
        process = subprocess.Popen(
            [sys.executable, "-m", "wandb", "sync", "--yes", str(folder)],
            env=environment,
            cwd=place,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            said, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise NanochatError(f"wandb sync did not end within {seconds:.0f} s", "nanochat sync, later") from None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    errors = [line for line in said.splitlines() if re.search(r"\bERROR\b|\bError:|^panic:", line)]
    if process.returncode != 0 or errors:
        told = errors[0] if errors else (said.strip().splitlines() or ["no word"])[-1]
        raise NanochatError(f"wandb sync failed ({told.strip()[:200]})", "nanochat sync, when that is mended")


def _arrival_problem(server: Server, merged: Merged, expected: int, seconds: float) -> str:
    """What is missing on the server after so many seconds, or nothing."""
    last, until = max(merged.rows, default=-1), time.monotonic() + seconds
    while True:
        there = server.look_up(merged.entity, merged.project, merged.run_id)
        if there.rows == expected and there.last_step == last:
            return ""
        if time.monotonic() > until:
            return (
                f"{there.rows} rows up to step {there.last_step} are there, {expected} up to step {last} should be — "
                f"nanochat sync once more; if that does not help, delete the run in W&B first"
            )
        time.sleep(min(1.0, seconds / 10))

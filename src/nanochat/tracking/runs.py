"""The local record of a stage of a run: what it was, how it ended, where its metrics and W&B segments are.

Beside each `metrics.jsonl` lies `run.json`. Together they say all that W&B is told, so that runs can be listed,
compared and uploaded without it.
"""

import dataclasses
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nanochat.errors import DataError, ExitCode, StopSignal, UsageError
from nanochat.files import read_json, write_json
from nanochat.tracking.keys import BPB, LOSS, SMOOTHED_LOSS
from nanochat.tracking.metrics import read
from nanochat.tracking.wandb_run import AskedMode, RunNames, WandbRun, start_wandb
from nanochat.workspace import Workspace, check_run_name

RECORD_NAME = "run.json"
METRICS_NAME = "metrics.jsonl"

# A step of a large model and an evaluation take minutes, and a file system may show another node's writes late.
QUIET_SECONDS = 600.0

# W&B's own mark of an uploaded segment, so that `wandb sync` leaves alone what `nanochat sync` has sent.
MARK = ".synced"

State = Literal["running", "finished", "stopped", "failed"]
STATE_OF_EXIT: dict[int, State] = {ExitCode.DONE: "finished", ExitCode.REQUEUE: "stopped"}


@dataclass(frozen=True)
class RunRecord:
    """What `run.json` holds.

    Attributes:
        run: name of the run.
        stage: base, mid, sft, rl or eval.
        model_tag: the model.
        num_steps: how many were asked for; 0 where there are no steps.
        names: what it is called in W&B.
        wandb_folder: the folder that W&B's run folders are in; None where nothing was recorded for W&B.
        config: the whole configuration, derived values included.
        started: seconds since 1970 of the first start.
        state: how it stands; `running` stays when a process is killed.
        exit_code: of the last end.
        final: the last evaluation.
    """

    run: str
    stage: str
    model_tag: str
    num_steps: int
    names: RunNames
    wandb_folder: str | None
    config: dict[str, Any]
    started: float
    state: State = "running"
    exit_code: int | None = None
    final: dict[str, float] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> "RunRecord":
        """Read a stage's record.

        Raises:
            DataError: it is missing or damaged.
        """
        path = folder / RECORD_NAME
        content = read_json(path, "run the stage again, which writes it")
        try:
            names = {**content["names"], "tags": tuple(content["names"]["tags"])}
            return cls(**{**content, "names": RunNames(**names)})
        except (KeyError, TypeError) as error:
            raise DataError(f"{path} is not the record of a run ({error})", f"rm {path}") from None

    def write(self, folder: Path) -> None:
        """Store it. A full disk costs the record, not the run, so nothing is raised for it."""
        try:
            write_json(folder / RECORD_NAME, dataclasses.asdict(self))
        except OSError:
            return

    def ended(self, exit_code: int, final: Mapping[str, float]) -> "RunRecord":
        """The same run after its process ended."""
        state = STATE_OF_EXIT.get(exit_code, "failed")
        return dataclasses.replace(self, state=state, exit_code=exit_code, final=dict(final))


def begin_record(
    folder: Path, names: RunNames, *, run: str, stage: str, model_tag: str, num_steps: int, config: dict[str, Any]
) -> RunRecord:
    """The record of a stage that starts or carries on, which keeps the display name and the start it had."""
    started = time.time()
    try:
        before = RunRecord.read(folder)
    except DataError:
        pass
    else:
        started, names = before.started, dataclasses.replace(names, name=before.names.name)
    return RunRecord(run, stage, model_tag, num_steps, names, None, config, started)


@dataclass
class TrackedRun:
    """A stage under way: its W&B run, and what to call final once it is known."""

    wandb: WandbRun
    final: dict[str, float] = dataclasses.field(default_factory=dict)


@contextmanager
def track_run(record: RunRecord, folder: Path, wandb_folder: Path, mode: AskedMode) -> Iterator[TrackedRun]:
    """Keep a stage's record and its W&B run while the block runs, and end both however it ends.

    Args:
        record: as of `begin_record`.
        folder: where the record goes.
        wandb_folder: where W&B may write.
        mode: of W&B.

    Raises:
        UsageError: as `start_wandb`.
    """
    wandb = start_wandb(record.names, record.config, folder=wandb_folder, mode=mode)
    if wandb.folder is not None:
        # <folder>/wandb/offline-run-…/: what `sync` looks through.
        record = dataclasses.replace(record, wandb_folder=str(wandb.folder.parents[1]))
    record.write(folder)
    tracked, exit_code = TrackedRun(wandb), int(ExitCode.FAILED)
    try:
        yield tracked
        exit_code = int(ExitCode.DONE)
    except BaseException as error:
        failed = ExitCode.REQUEUE if isinstance(error, StopSignal) else ExitCode.FAILED
        exit_code = int(getattr(error, "exit_code", failed))
        # It is printed when W&B does not listen any more, and is what one looks for in a failed run's Logs.
        wandb.note(f"{type(error).__name__}: {error}")
        raise
    finally:
        wandb.summary(tracked.final)
        wandb.finish(exit_code)
        record.ended(exit_code, tracked.final).write(folder)


@dataclass(frozen=True)
class RunSummary:
    """One line of `nanochat runs`: what the local files say of a stage of a run.

    Attributes:
        folder: where its files are.
        record: its record.
        state: as recorded, or `lost` where it says running and nothing was written for `QUIET_SECONDS`.
        step: the last one with metrics.
        loss: the last smoothed training loss.
        bpb: the last bits per byte.
        seconds_quiet: since anything was written.
        synced: whether all of it is on W&B's server; None where nothing was recorded for W&B.
    """

    folder: Path
    record: RunRecord
    state: State | Literal["lost"]
    step: int
    loss: float | None
    bpb: float | None
    seconds_quiet: float
    synced: bool | None


def stage_folders(workspace: Workspace, run: str | None = None) -> Iterator[Path]:
    """The folders with a record, of one run or of all, those of experiments' arms last."""
    name = "*" if run is None else check_run_name(run)
    for runs in (workspace.root / "runs", *sorted(workspace.root.glob("experiments/*/*/runs"))):
        yield from sorted(path.parent for path in runs.glob(f"{name}/*/*/{RECORD_NAME}"))


def find_stage(workspace: Workspace, name: str) -> Path:
    """The folder of `run`, `run/stage` or `run/stage/model tag`; of a run alone, the base model's if it has one.

    Raises:
        UsageError: there is none, or more than one.
    """
    run, *rest = name.split("/")
    found = [folder for folder in stage_folders(workspace, run) if list(folder.parts[-2:])[: len(rest)] == rest]
    if not rest and len(found) > 1:
        found = [folder for folder in found if folder.parent.name == "base"] or found
    if len(found) == 1:
        return found[0]
    if not found:
        raise UsageError(f"there is no tracked run {name!r} in {workspace.root / 'runs'}", "see: nanochat runs")
    named = " ".join("/".join(folder.parts[-3:]) for folder in found)
    raise UsageError(f"{name!r} may mean several", f"name one of: {named}")


def summarise(folder: Path, workspace: Workspace) -> RunSummary:
    """Read what the local files say of a stage.

    Raises:
        DataError: a file is damaged.
    """
    record = RunRecord.read(folder)
    metrics = folder / METRICS_NAME
    rows = read(metrics) if metrics.exists() else []

    def last(*keys: str) -> float | None:
        return next((row[key] for row in reversed(rows) for key in keys if key in row), None)

    quiet = max(0.0, time.time() - last_written((folder / RECORD_NAME,), metrics))
    state: State | Literal["lost"] = record.state
    if state == "running" and quiet > QUIET_SECONDS:
        state = "lost"
    step = max((row["step"] for row in rows), default=0)
    segments = segments_of_record(record, workspace)
    synced = is_synced(segments, metrics) if segments or record.wandb_folder else None
    return RunSummary(folder, record, state, step, last(SMOOTHED_LOSS, LOSS), last(BPB), quiet, synced)


def last_written(files: Sequence[Path], metrics: Path | None) -> float:
    """When, in seconds since 1970, any of these was written to; 0 if none is there."""
    paths = (*files, *([metrics] if metrics is not None else []))
    return max((path.stat().st_mtime for path in paths if path.exists()), default=0.0)


def mark_of(segment: Path) -> Path:
    """The mark beside a segment that says it is on the server."""
    return segment.with_name(segment.name + MARK)


def is_synced(segments: Sequence[Path], metrics: Path | None) -> bool:
    """Whether nothing was written since the run was last seen to have arrived on the server."""
    marks = [mark_of(path) for path in segments]
    if not marks or not all(mark.exists() for mark in marks):
        return False
    return max(mark.stat().st_mtime for mark in marks) >= last_written(segments, metrics)


def segments_of(folder: Path, run_id: str) -> list[Path]:
    """W&B's transaction logs of one run, oldest first: every start of it wrote one."""
    # Their folders are named by the second of the start, so by name is by time; a suffix tells those of one second.
    logs = folder.glob(f"wandb/*run-*-{run_id}*/run-{run_id}.wandb")
    return sorted(logs, key=lambda path: (path.parent.name.removeprefix("offline-"), path.stat().st_mtime))


def segments_of_record(record: RunRecord, workspace: Workspace) -> list[Path]:
    """A stage's segments, wherever W&B was told to write, or where this machine would look for them."""
    named = record.wandb_folder and Path(record.wandb_folder)
    here = Path(os.environ.get("WANDB_DIR") or workspace.wandb)
    return segments_of(named if named and named.is_dir() else here, record.names.id)

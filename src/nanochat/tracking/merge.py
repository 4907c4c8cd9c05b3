"""All that is known of one run, as one clean W&B segment.

Every start of a run wrote a segment of its own. A run killed at step 9 and resumed from its checkpoint of step 7 has
steps 8 and 9 twice, and W&B, which uploads segments one after another, would move the second ones to steps 10 and 11;
what was not yet flushed at the kill is missing altogether. So segments are never uploaded as they are. Here their rows
are put together, `metrics.jsonl` having the last word, and console, system metrics and media follow in their order.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.errors import DataError
from nanochat.tracking import metrics
from nanochat.tracking.runs import RunRecord
from nanochat.tracking.transaction_log import read_log, record_types

# Values by their path in a row, as JSON: `("samples", "path")` is the key `path` of the value of `samples`.
Row = dict[tuple[str, ...], str]

# Of a record's kinds, those that are sent once, with the segment that has them.
SENT_ONCE = ("artifact", "use_artifact", "alert", "files")


@dataclass(frozen=True)
class Source:
    """Where one run's traces are.

    Attributes:
        run_id: W&B's id.
        segments: its transaction logs, oldest first.
        metrics: its ground truth, of a run of ours.
        record: what is known of it, likewise.
    """

    run_id: str
    segments: tuple[Path, ...]
    metrics: Path | None = None
    record: RunRecord | None = None


@dataclass(frozen=True)
class Merged:
    """One run, put together.

    Attributes:
        entity: the owner in W&B, empty for the key's own.
        project: the project in W&B.
        run_id: W&B's id.
        head: records that begin a segment: versions, the run with its configuration, machine, metric definitions.
        rows: by step.
        lines: of the console, as records.
        stats: system metrics, as records.
        once: what goes up with the first upload only, by segment.
        summary: final figures.
        exit: how the last start ended, if it did.
    """

    entity: str
    project: str
    run_id: str
    head: list[Any]
    rows: dict[int, Row]
    lines: list[Any]
    stats: list[Any]
    once: dict[Path, list[Any]]
    summary: Row
    exit: list[Any]

    def records(self, *, after_step: int, num_lines: int, num_stats: int, sent: Iterable[Path]) -> list[Any]:
        """The records of a segment that brings a server what it lacks.

        Args:
            after_step: it has the rows up to this step.
            num_lines: it has so many lines of console.
            num_stats: it has so many system metrics.
            sent: it has what these segments bring once.
        """
        wandb = record_types()
        history = [
            wandb.Record(history=wandb.HistoryRecord(item=_items(wandb.HistoryItem, row), step={"num": step}))
            for step, row in self.rows.items()
            if step > after_step
        ]
        once = [record for segment, records in self.once.items() if segment not in set(sent) for record in records]
        summary = wandb.Record(summary=wandb.SummaryRecord(update=_items(wandb.SummaryItem, self.summary)))
        return [*self.head, *once, *self.stats[num_stats:], *self.lines[num_lines:], *history, summary, *self.exit]


def _items(kind: Any, row: Row) -> list[Any]:
    return [kind(nested_key=path, value_json=value) for path, value in row.items()]


def _row(items: Iterable[Any]) -> Row:
    return {tuple(item.nested_key) or (item.key,): item.value_json for item in items}


def merge(source: Source) -> Merged:
    """Put a run together.

    Raises:
        DataError: nothing of it can be read.
    """
    logs = {path: records for path in source.segments if (records := read_log(path))}
    head = _head(source, list(logs.values()))
    run = next(record.run for record in head if record.HasField("run"))
    rows = _merge_rows([_of(records, "history") for records in logs.values()])
    if source.metrics is not None and source.metrics.exists():
        rows = _correct(rows, metrics.read(source.metrics))
    return Merged(
        entity=run.entity,
        project=run.project,
        run_id=source.run_id,
        head=head,
        rows=_with_times(rows),
        lines=[line for records in logs.values() for line in _lines(records)],
        stats=[record for records in logs.values() for record in _of(records, "stats")],
        once={path: [record for kind in SENT_ONCE for record in _of(records, kind)] for path, records in logs.items()},
        summary=_summary(source, rows, [record for records in logs.values() for record in _of(records, "summary")]),
        exit=_of(list(logs.values())[-1], "exit")[-1:] if logs else [],
    )


def _of(records: Iterable[Any], kind: str) -> list[Any]:
    return [record for record in records if record.WhichOneof("record_type") == kind]


def _head(source: Source, logs: Sequence[list[Any]]) -> list[Any]:
    """How the newest segment begins, with the first one's start; of a run without any, made from its record."""
    wandb = record_types()
    for records in reversed(logs):
        if runs := _of(records, "run"):
            first = next(found[0] for log in logs if (found := _of(log, "run")))
            run = wandb.Record()
            run.CopyFrom(runs[-1])
            run.run.start_time.CopyFrom(first.run.start_time)
            # Resuming is what makes a second upload go on from the first.
            run.run.resume = True
            kinds = ("environment", "metric")
            return [*_of(records, "header"), run, *(record for kind in kinds for record in _of(records, kind))]
    if source.record is None:
        raise DataError(f"{source.segments[0]} holds no run: its process ended before it wrote one")
    names = source.record.names
    run = wandb.RunRecord(
        run_id=names.id,
        project=names.project,
        display_name=names.name,
        run_group=names.group,
        job_type=names.job_type,
        tags=names.tags,
        resume=True,
        start_time={"seconds": int(source.record.started)},
        config={
            "update": [{"key": key, "value_json": json.dumps(value)} for key, value in source.record.config.items()]
        },
    )
    by_step = {"glob_name": "*", "step_metric": "step", "options": {"step_sync": True, "defined": True}}
    return [
        # As wandb 0.31 writes it: readers from this version on understand the log.
        wandb.Record(header={"version_info": {"producer": "nanochat", "min_consumer": "0.70.0"}}),
        wandb.Record(run=run),
        wandb.Record(metric={"name": "step", "options": {"defined": True}}),
        wandb.Record(metric=by_step),
    ]


def _merge_rows(histories: Iterable[list[Any]]) -> dict[int, Row]:
    """Rows by step. A segment that begins at an earlier step replaces what came after that step."""
    segments = [[(record.history.step.num, _row(record.history.item)) for record in history] for history in histories]
    # Where every row says its step itself, W&B's own count is not needed, which starts at 0 in every process.
    explicit = all(("step",) in row for segment in segments for _, row in segment)
    rows: dict[int, Row] = {}
    runtime = 0.0
    for segment in filter(None, segments):
        steps = [int(json.loads(row[("step",)])) if explicit else step for step, row in segment]
        if rows and not explicit and steps[0] == 0:
            offset = max(rows) + 1
            steps = [step + offset for step in steps]
        rows = {step: row for step, row in rows.items() if step <= steps[0]}
        for step, (_, row) in zip(steps, segment, strict=True):
            if ("_runtime",) in row:
                row = {**row, ("_runtime",): json.dumps(runtime + float(json.loads(row[("_runtime",)])))}
            rows.setdefault(step, {}).update(row)
        runtime = max((float(json.loads(row.get(("_runtime",), "0"))) for row in rows.values()), default=0.0)
    return dict(sorted(rows.items()))


def _correct(rows: dict[int, Row], truth: Sequence[Mapping[str, Any]]) -> dict[int, Row]:
    """The rows as `metrics.jsonl` has them, with what only W&B was given, samples for example."""
    last = max((row["step"] for row in truth), default=-1)
    corrected = {step: dict(row) for step, row in rows.items() if step <= last}
    for row in truth:
        values: Row = {(key,): json.dumps(value) for key, value in row.items()}
        corrected.setdefault(row["step"], {}).update(values)
    return dict(sorted(corrected.items()))


def _with_times(rows: dict[int, Row]) -> dict[int, Row]:
    """Rows with their own step, and with the times of the row before where they have none."""
    times: Row = {}
    timed = {}
    for step, row in rows.items():
        times = {path: row.get(path, times.get(path, "0")) for path in (("_timestamp",), ("_runtime",))}
        timed[step] = {**row, **times, ("_step",): str(step)}
    return timed


def _lines(records: Iterable[Any]) -> list[Any]:
    """A segment's console as a record for each whole line: captured, a line may come in pieces."""
    whole: list[Any] = []
    for record in _of(records, "output_raw"):
        for text in record.output_raw.line.splitlines(keepends=True):
            if whole and not whole[-1].output_raw.line.endswith("\n"):
                whole[-1].output_raw.line += text
            else:
                piece = type(record)()
                piece.CopyFrom(record)
                piece.output_raw.line = text
                whole.append(piece)
    if whole and not whole[-1].output_raw.line.endswith("\n"):
        whole[-1].output_raw.line += "\n"
    return whole


def _summary(source: Source, rows: dict[int, Row], records: Iterable[Any]) -> Row:
    """The final figures: as W&B had them, brought up to the last row, and what a stage calls final."""
    summary: Row = {}
    for record in records:
        summary.update(_row(record.summary.update))
    # Not what was asked to be summarised otherwise, as a minimum for example.
    otherwise = {path[0] for path in summary if len(path) > 1}
    for row in rows.values():
        summary.update({path: value for path, value in row.items() if path[0] not in otherwise})
    final = source.record.final if source.record is not None else {}
    return {**summary, **{(key,): json.dumps(value) for key, value in final.items()}}

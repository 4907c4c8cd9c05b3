"""The runs of a workspace as a table for a terminal."""

from nanochat.errors import DataError, UsageError
from nanochat.tracking.console import format_seconds
from nanochat.tracking.runs import RunSummary, stage_folders, summarise
from nanochat.workspace import Workspace

HEADER: tuple[str, ...] = ("run", "stage", "model", "state", "step", "loss", "bpb", "written", "on W&B")


def table_of_runs(workspace: Workspace, run: str | None = None) -> str:
    """A line for each stage of each run, or of one; a record that is damaged has a line that says so.

    Raises:
        UsageError: the one that is asked for is not there.
    """
    lines = [HEADER]
    for folder in stage_folders(workspace, run):
        try:
            lines.append(_line(summarise(folder, workspace)))
        except DataError as error:
            lines.append((*folder.parts[-3:], str(error), "", "", "", "", ""))
    if len(lines) == 1 and run is not None:
        raise UsageError(f"there is no tracked run {run!r} in {workspace.root / 'runs'}", "see: nanochat runs")
    if len(lines) == 1:
        return f"there are no runs in {workspace.root / 'runs'}"
    widths = [max(len(line[place]) for line in lines if len(line[place]) < 80) for place in range(len(HEADER))]
    padded = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join(line.rstrip() for line in padded)


def _line(run: RunSummary) -> tuple[str, ...]:
    record = run.record
    return (
        record.run,
        record.stage,
        record.model_tag,
        run.state,
        f"{run.step}/{record.num_steps}" if record.num_steps else "",
        "" if run.loss is None else f"{run.loss:.4f}",
        "" if run.bpb is None else f"{run.bpb:.4f}",
        f"{format_seconds(run.seconds_quiet)} ago",
        "" if run.synced is None else "yes" if run.synced else "no",
    )

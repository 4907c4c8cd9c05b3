"""What can be learnt from runs."""

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from nanochat.commands.options import run_name
from nanochat.workspace import Workspace

Names = Annotated[Positional[tuple[str, ...]], arg(metavar="[NAMES ...]")]


def report(*, run: str = "", gpu_hour_price: float | None = None) -> None:
    """Render report/report.md from what the stages stored.

    Args:
        run: name of the run; default: the environment's WANDB_RUN.
        gpu_hour_price: what an hour of one GPU costs, to tell what the stages cost.
    """
    from nanochat.errors import UsageError
    from nanochat.tracking.report import render_report

    workspace, name = Workspace.from_environment(), run_name(run)
    if not workspace.run(name).is_dir():
        raise UsageError(f"there is no run {name!r} in {workspace.root}", f"see: ls {workspace.root / 'runs'}")
    print(render_report(workspace.report, name, gpu_hour_price))


def runs(*, run: str = "") -> None:
    """List the runs of this workspace: state, stage, step, loss, and whether they are on W&B's server.

    Args:
        run: only this one; default: all. The environment's WANDB_RUN does not count here.
    """
    from nanochat.tracking.listing import table_of_runs

    print(table_of_runs(Workspace.from_environment(), run or None))


def sync(names: Names = (), /, *, dry_run: bool = False, quiet_minutes: float = 10.0) -> None:
    """Bring runs that were recorded offline to W&B, and see that they arrived; run it where there is internet.

    A run's segments are put together first, so that a run that was stopped and resumed has each step once. What is
    there already is not sent again.

    Args:
        names: runs, or folders that W&B wrote to; default: every run of this workspace.
        dry_run: say what would be sent, and send nothing.
        quiet_minutes: a run without an end counts as dead, not as under way, after so many minutes without a sign.
    """
    from nanochat.errors import NanochatError
    from nanochat.tracking.sync import Outcome, Server, find_sources, sync

    def report(outcome: Outcome) -> None:
        print(f"{outcome.run_id}: {outcome.state}: {outcome.text}", flush=True)

    sources = find_sources(Workspace.from_environment(), names)
    server = None if dry_run else Server.from_environment()
    outcomes = sync(sources, server=server, quiet_seconds=60 * quiet_minutes, report=report)
    if failed := [outcome for outcome in outcomes if outcome.state == "failed"]:
        raise NanochatError(
            f"{len(failed)} of {len(outcomes)} runs are not on the server", "see above; then run it again"
        )
    if not outcomes:
        print("there are no runs yet")


def compare(names: Names = (), /, *, to: Path | None = None) -> None:
    """Draw the curves of two or more runs side by side, and say what else differed between them.

    Args:
        names: the runs: RUN, RUN/STAGE or RUN/STAGE/MODEL_TAG; of a run alone, its base model.
        to: the folder to write; default: one in report/ named by the runs.
    """
    from nanochat.tracking.compare import ComparedRun, differences, say_differences, write_comparison
    from nanochat.tracking.runs import find_stage

    workspace = Workspace.from_environment()
    compared = [ComparedRun.read(find_stage(workspace, name), name) for name in names]
    folder = to or workspace.report / "compare" / "-vs-".join(name.replace("/", "-") for name in names)
    page = write_comparison(folder, compared, " vs ".join(names))
    print(say_differences(differences({run.label: run.record for run in compared})))
    print(page)

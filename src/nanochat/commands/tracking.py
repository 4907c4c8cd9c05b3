"""What can be learnt from runs."""

from nanochat.commands.options import run_name
from nanochat.workspace import Workspace


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

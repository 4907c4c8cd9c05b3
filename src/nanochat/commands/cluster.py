"""The machine and what runs on it."""

from typing import Annotated

from tyro.conf import arg

from nanochat.commands.options import SpeedrunSettings, given_name
from nanochat.workspace import Workspace


def doctor(*, expect_gpus: int | None = None, expect_driver: str | None = None) -> None:
    """Say what this machine, or the image on it, offers for training, and for each problem what mends it.

    Nothing is written. It ends with exit code 3 if there is a problem.

    Args:
        expect_gpus: GPUs that there must be, no more and no fewer, as a job asked for them.
        expect_driver: oldest driver that there may be, for example 580 or 535.104.
    """
    from nanochat.cluster.doctor import examine
    from nanochat.cluster.findings import table
    from nanochat.errors import PreflightError
    from nanochat.identity import version_line

    print(version_line(), flush=True)
    findings = examine(expect_gpus=expect_gpus, expect_driver=expect_driver)
    print(table(findings))
    problems = sum(finding.state == "PROBLEM" for finding in findings)
    if problems:
        raise PreflightError(f"{problems} of {len(findings)} findings are problems", "the line of each says the fix")


def status(run: Annotated[str, arg(metavar="RUN")] = "", /) -> None:
    """Say whether runs are really moving: where they are, how fast, what is left, and what ended them.

    Args:
        run: one run, in full; default: a line for each run of the workspace.
    """
    from nanochat.cluster.status import show_run, show_runs

    workspace = Workspace.from_environment()
    print(show_run(workspace, run) if run else show_runs(workspace))


def preflight(
    settings: Annotated[SpeedrunSettings, arg(name="")],
    *,
    nodes: int = 1,
    gpus_per_node: int = 1,
    time_limit: str | None = None,
    gpu_tflops: float = 100.0,
    checksums: bool = False,
) -> None:
    """List everything that would stop a run, in seconds, with what mends it, before a GPU is asked for.

    It takes the flags of `nanochat speedrun`, needs no GPU, and writes nothing. It ends with exit code 3 if there is
    a problem.

    Args:
        settings: the run.
        nodes: machines it will run on.
        gpus_per_node: GPUs of each; 0 for a run on CPUs.
        time_limit: of its job, in one of Slurm's forms: minutes, HH:MM:SS or D-HH:MM:SS.
        gpu_tflops: what one GPU does, in 10¹² FLOPs per second, for the estimate of time.
        checksums: also read every byte of corpus and token shards.
    """
    from nanochat.cluster.findings import table
    from nanochat.cluster.preflight import Request, examine
    from nanochat.errors import PreflightError

    findings = examine(
        Request(
            config=settings.config(given_name(settings.run)),
            stages=settings.stages,
            workspace=Workspace.from_environment(),
            nodes=nodes,
            gpus_per_node=gpus_per_node,
            time_limit=time_limit,
            gpu_tflops=gpu_tflops,
            checksums=checksums,
        )
    )
    print(table(findings))
    problems = sum(finding.state == "PROBLEM" for finding in findings)
    if problems:
        raise PreflightError(f"{problems} of {len(findings)} findings are problems", "the line of each says the fix")

"""Experiments: arms that differ in their data alone."""

import sys
from pathlib import Path

from tyro.conf import OmitArgPrefixes, Positional

from nanochat.config import MachineConfig
from nanochat.workspace import Workspace


def plan(file: Positional[Path], /, *, json: bool = False) -> None:
    """Show what differs between the arms of an experiment and what is equal, and refuse what is hidden.

    Args:
        file: the experiment, a TOML file.
        json: print the runs and the commands before them as JSON, for a scheduler.
    """
    from json import dumps

    from nanochat.errors import PreflightError
    from nanochat.experiment.plan import as_json, make_plan, render
    from nanochat.experiment.specification import ExperimentFolder, read_experiment

    experiment = read_experiment(file)
    made = make_plan(experiment, ExperimentFolder.of(experiment, Workspace.from_environment()))
    if not json:
        print(render(made, experiment))
    for problem in made.problems:
        print(f"problem: {problem}", file=sys.stderr)
    if made.problems:
        raise PreflightError(f"{file} cannot be run as it is: see the problems above", "mend them, and look again")
    if json:
        print(dumps(as_json(experiment), indent=2))


def prepare(file: Positional[Path], /, *, workers: int | None = None) -> None:
    """Make what all runs of an experiment read, on CPU: data, one tokenizer, tokens, validation sets.

    Args:
        file: the experiment, a TOML file.
        workers: processes that tokenise; default: one per core.
    """
    from nanochat.experiment.prepare import prepare as prepare_experiment
    from nanochat.experiment.specification import ExperimentFolder, read_experiment
    from nanochat.tracking.console import Console

    experiment = read_experiment(file)
    folder = ExperimentFolder.of(experiment, Workspace.from_environment())
    prepare_experiment(experiment, folder, Console(), workers)


def run(
    file: Positional[Path],
    /,
    *,
    machine: OmitArgPrefixes[MachineConfig],
    arm: str,
    seed: int | None = None,
    device_batch_size: int | None = None,
    allow_other_software: bool = False,
) -> None:
    """Train one arm with one seed on this host and measure it; carries on where it was stopped.

    Args:
        file: the experiment, a TOML file.
        machine: how the machine is used.
        arm: which arm.
        seed: which seed; default: the first.
        device_batch_size: rows per forward pass on one device; default: as the file says. The result does not change.
        allow_other_software: train even if other runs were made by other code, image or torch; the comparison says so.
    """
    from nanochat.experiment.run import run_arm
    from nanochat.experiment.specification import ExperimentFolder, read_experiment
    from nanochat.runtime import start_runtime

    experiment = read_experiment(file)
    workspace = Workspace.from_environment()
    with start_runtime(machine.device, machine.dtype, cache=workspace.cache) as runtime:
        run_arm(
            experiment,
            ExperimentFolder.of(experiment, workspace),
            arm,
            experiment.seeds[0] if seed is None else seed,
            machine,
            runtime,
            device_batch_size=device_batch_size,
            allow_other_software=allow_other_software,
        )


def compare(file: Positional[Path], /) -> None:
    """Compare the arms of an experiment: curves, intervals over seeds, and a verdict in plain words.

    Args:
        file: the experiment, a TOML file.
    """
    from nanochat.experiment.compare import compare as compare_arms
    from nanochat.experiment.specification import ExperimentFolder, read_experiment

    experiment = read_experiment(file)
    folder = ExperimentFolder.of(experiment, Workspace.from_environment())
    print("\n".join([*compare_arms(experiment, folder), str(folder.report / "report.md")]))

"""One arm with one seed, trained and measured on this host; the same command carries on after any stop."""

import contextlib
import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from nanochat.checkpoint.folders import list_steps
from nanochat.checkpoint.trained_model import TrainedModel, load_trained_model
from nanochat.config import MachineConfig, RunConfig, StageName
from nanochat.errors import DataError, UsageError
from nanochat.evaluation.bits_per_byte import bits_per_byte
from nanochat.experiment.records import (
    base_config,
    evaluation_of,
    hidden_differences,
    horizon_of,
    prepare_command,
    read_prepared,
    read_results,
    software,
    training_identity,
)
from nanochat.experiment.specification import SHARED_SET, Arm, Experiment, ExperimentFolder
from nanochat.files import lock_folder, read_json, read_manifest, write_json
from nanochat.loader.batches import validation_rows
from nanochat.loader.token_shards import MANIFEST_KIND, TokenDataset
from nanochat.pipeline import run_pipeline
from nanochat.runtime import Runtime, from_main, run_on_main
from nanochat.tracking.console import Console, format_count
from nanochat.tracking.environment import describe_environment
from nanochat.tracking.keys import BPB, FLOPS, SMOOTHED_LOSS, TOKENS, TRAIN_SECONDS
from nanochat.tracking.metrics import read
from nanochat.tracking.wandb_run import EXPERIMENTS_PROJECT
from nanochat.training.session import metrics_path, number_format
from nanochat.workspace import Stage

# A curve for a picture and a table needs no more points, however long the run.
MOST_POINTS = 1000


def run_arm(
    experiment: Experiment,
    folder: ExperimentFolder,
    arm_name: str,
    seed: int,
    machine: MachineConfig,
    runtime: Runtime,
    *,
    device_batch_size: int | None = None,
    allow_other_software: bool = False,
) -> dict[str, Any]:
    """Train an arm with a seed, measure it on every validation set, and record both.

    Args:
        machine: how this host is used.
        device_batch_size: rows per forward pass of the base model, if not what the file says.
        allow_other_software: train though other runs were trained by other code, image or torch; it is recorded.

    Returns:
        The record, on rank 0; nothing on others.

    Raises:
        UsageError: there is no such arm or seed, it is being trained already, or it could not be compared with
            runs that have started.
        DataError: what it needs was not prepared, or is damaged.
        StoppedForRequeueError: a signal stopped the run after a checkpoint.
    """
    arm = experiment.arm(arm_name)
    if seed not in experiment.seeds:
        raise UsageError(
            f"{experiment.file} has no seed {seed}", f"choose of {', '.join(map(str, experiment.seeds))}, or add it"
        )
    run = experiment.run_name(arm, seed)
    workspace = folder.arm(arm.name, run)
    console = Console(enabled=runtime.is_main)
    prepared = from_main(run_on_main(lambda: read_prepared(experiment, folder)))
    # W&B shows the runs of an experiment together, and apart from long ones.
    machine = dataclasses.replace(
        machine,
        wandb_project=machine.wandb_project or os.environ.get("WANDB_PROJECT") or EXPERIMENTS_PROJECT,
        wandb_group=machine.wandb_group or os.environ.get("WANDB_RUN_GROUP") or experiment.name,
    )
    config = _run_config(experiment, folder, arm, seed, machine, prepared, device_batch_size)
    what = f"the arm {arm.name} with seed {seed} of {experiment.name}"
    with run_on_main(lambda: lock_folder(workspace.run(run), what)) or contextlib.nullcontext():
        run_on_main(lambda: _check_prepared(experiment, folder, arm, prepared))
        is_first_start = not folder.result(arm.name, seed).exists()
        done = run_on_main(
            lambda: _start(experiment, folder, arm, seed, machine, prepared, runtime, allow_other_software)
        )
        if from_main(done is not None):
            console.info(f"{run}: already done, {folder.result(arm.name, seed)}")
            return done or {}
        stages: tuple[StageName, ...] = experiment.stages
        try:
            run_pipeline(config, workspace, runtime, stages)
        except BaseException:
            checkpoints = workspace.checkpoints("base", config.base.tag)
            if runtime.is_main and is_first_start and not list_steps(checkpoints):
                # Nothing is left of the run that a later one could differ from.
                folder.result(arm.name, seed).unlink(missing_ok=True)
            raise
        trained = load_trained_model(workspace, "base", config.base.tag, runtime, console)
        final = {
            f"bpb/{name}": _validate(trained, experiment, folder, name, runtime, config.base.device_batch_size)
            for name in (SHARED_SET, *experiment.arms)
        }
        record = run_on_main(lambda: _finish(experiment, folder, arm, seed, config, trained, final, runtime))
    console.info(
        f"{run}: {format_count(config.base.num_steps or 0)} steps, "
        + ", ".join(f"{name} {value:.4f}" for name, value in final.items())
    )
    return record or {}


def _run_config(
    experiment: Experiment,
    folder: ExperimentFolder,
    arm: Arm,
    seed: int,
    machine: MachineConfig,
    prepared: Mapping[str, Any],
    device_batch_size: int | None,
) -> RunConfig:
    base = base_config(experiment, arm, seed, horizon_of(experiment, arm, prepared))
    base = dataclasses.replace(
        base,
        device_batch_size=base.device_batch_size if device_batch_size is None else device_batch_size,
        **{field.name: getattr(machine, field.name) for field in dataclasses.fields(MachineConfig)},
    )
    return RunConfig(
        run=experiment.run_name(arm, seed),
        data="existing",
        tokenizer=experiment.tokenizer,
        base=base,
        mid=dataclasses.replace(arm.settings.mid, seed=seed),
        sft=dataclasses.replace(arm.settings.sft, seed=seed),
        evaluation=evaluation_of(experiment, arm),
        also_validate={SHARED_SET: folder.validation(SHARED_SET)},
    )


def _check_prepared(experiment: Experiment, folder: ExperimentFolder, arm: Arm, prepared: Mapping[str, Any]) -> None:
    """Check that what this host has is what was prepared. Every byte is checked by those who read it."""
    fix = f"{prepare_command(experiment)}, or copy {folder.root} from where that ran"
    places = {folder.arm(arm.name).tokens: prepared["arms"][arm.name]["fingerprint"]}
    places |= {folder.validation(name): about["fingerprint"] for name, about in prepared["validation"].items()}
    for place, expected in places.items():
        if read_manifest(place, MANIFEST_KIND, fix)["fingerprint"] != expected:
            raise DataError(f"{place} is not what {folder.prepared} says was prepared", fix)


def _start(
    experiment: Experiment,
    folder: ExperimentFolder,
    arm: Arm,
    seed: int,
    machine: MachineConfig,
    prepared: Mapping[str, Any],
    runtime: Runtime,
    allow_other_software: bool,
) -> dict[str, Any] | None:
    """Record what is about to be trained, unless it could not be compared with what was.

    Returns:
        The record if the run has finished before, else None.
    """
    results = read_results(experiment, folder)
    dtype = number_format(machine, runtime)
    now = software()
    seen = {key: {**record, "software": now} if allow_other_software else record for key, record in results.items()}
    if hidden := hidden_differences(experiment, prepared, seen, now, dtype):
        raise UsageError(
            f"this run could not be compared: {hidden[0]}" + (f" ({len(hidden)} differences)" if hidden[1:] else ""),
            f"see all with: nanochat experiment plan {experiment.file}; "
            f"restore that, or give the experiment another name",
        )
    if (arm.name, seed) in results and results[arm.name, seed]["state"] == "finished":
        return results[arm.name, seed]
    write_json(
        folder.result(arm.name, seed),
        {
            "experiment": experiment.name,
            "arm": arm.name,
            "seed": seed,
            "run": experiment.run_name(arm, seed),
            "state": "started",
            "identity": training_identity(experiment, arm, prepared),
            "software": _software_so_far(results.get((arm.name, seed), {}).get("software", now), now),
            "dtype": dtype,
            "hardware": _hardware(runtime),
        },
    )
    return None


def _software_so_far(before: Mapping[str, str], now: Mapping[str, str]) -> dict[str, str]:
    """What a run was made with that may have begun with another version."""
    return {
        name: value if before[name].split(" then ")[-1] == value else f"{before[name]} then {value}"
        for name, value in now.items()
    }


def _hardware(runtime: Runtime) -> str:
    """What trains, in a few words that are equal where the hardware is."""
    environment = describe_environment()
    names = {gpu["name"] for gpu in environment.get("gpus", ())} if runtime.num_gpus else {environment["cpu"]["model"]}
    return f"{runtime.world_size} × {' and '.join(sorted(names))}"


def _validate(
    trained: TrainedModel,
    experiment: Experiment,
    folder: ExperimentFolder,
    name: str,
    runtime: Runtime,
    device_batch_size: int,
) -> float:
    """Bits per byte of a whole validation set, up to the size that the file declares."""
    sequence_len = trained.model.config.sequence_len
    dataset = TokenDataset.open(folder.validation(name), "val")
    rows = validation_rows(dataset, sequence_len, max(1, experiment.validation_tokens // sequence_len))
    return bits_per_byte(trained.model, rows, trained.tokenizer.token_bytes(), runtime, device_batch_size)


def _finish(
    experiment: Experiment,
    folder: ExperimentFolder,
    arm: Arm,
    seed: int,
    config: RunConfig,
    trained: TrainedModel,
    final: Mapping[str, float],
    runtime: Runtime,
) -> dict[str, Any]:
    """Complete the record with all that a comparison needs, so that it can be made where only records are."""
    path = folder.result(arm.name, seed)
    workspace = folder.arm(arm.name, config.run)
    rows = read(metrics_path(workspace, config.run, "base", config.base.tag))
    record: dict[str, Any] = {
        **read_json(path),
        "state": "finished",
        "checkpoint": trained.fingerprint,
        "steps": trained.step,
        "tokens": trained.step * int(config.base.total_batch_size or 0),
        "final": {**final, **_task_scores(experiment, folder, arm, seed)},
        "curves": {"bpb": curve(rows, f"{BPB}_{SHARED_SET}"), "loss": curve(rows, SMOOTHED_LOSS)},
        "environment": describe_environment(),
    }
    write_json(path, record)
    return record


def _task_scores(experiment: Experiment, folder: ExperimentFolder, arm: Arm, seed: int) -> dict[str, float]:
    """Accuracies of the last stage that was examined."""
    if "eval" not in experiment.stages:
        return {}
    last: Stage = "sft" if "sft" in experiment.stages else "mid" if "mid" in experiment.stages else "base"
    evaluations = folder.arm(arm.name).evaluations(last, experiment.model_tag(arm, seed))
    newest = sorted(evaluations.glob("step_*_chat.json"))[-1]
    return {f"{last}/{name}": result["accuracy"] for name, result in read_json(newest)["results"].items()}


def curve(rows: list[dict[str, Any]], key: str) -> dict[str, list[float]]:
    """A metric with the tokens, FLOPs and seconds of training up to each of its points.

    Evaluations are logged without these, so they are read off between the steps that have them.
    """
    known = [row for row in rows if TOKENS in row]
    points = [row for row in rows if key in row]
    points = points[:: max(1, len(points) // MOST_POINTS)]
    steps = [row["step"] for row in points]
    columns = {"tokens": TOKENS, "flops": FLOPS, "seconds": TRAIN_SECONDS}
    return {
        **{
            name: np.interp(steps, [0, *(row["step"] for row in known)], [0, *(row[column] for row in known)]).tolist()
            for name, column in columns.items()
        },
        "value": [row[key] for row in points],
    }

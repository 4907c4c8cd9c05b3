"""What surrounds the loop in every stage: the checkpoint to carry on from, who watches, and what is reported."""

import contextlib
import functools
import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nanochat.checkpoint.store import Checkpoint
from nanochat.checkpoint.trained_model import newest_checkpoint
from nanochat.compiled_code import remove_cut_off_code, why_not_compile
from nanochat.config import MachineConfig, TrainBaseConfig, TrainChatConfig
from nanochat.errors import DataError
from nanochat.files import read_manifest
from nanochat.loader.batches import BatchLoader, LoaderConfig, LoaderStatistics
from nanochat.loader.token_shards import MANIFEST_KIND, TokenDataset
from nanochat.runtime import Runtime, check_tf32, gather_from_ranks, run_on_main
from nanochat.tokenizer.tokenizer import Tokenizer
from nanochat.tracking import keys
from nanochat.tracking.console import Console, format_seconds
from nanochat.tracking.environment import describe_environment
from nanochat.tracking.metrics import MetricsLog, Value, read, series
from nanochat.tracking.plots import plot_curves
from nanochat.tracking.report import Plot, Sample, Section, write_section
from nanochat.tracking.runs import RunRecord, begin_record, track_run
from nanochat.tracking.tensorboard import EventFiles, check_tensorboard
from nanochat.tracking.wandb_run import asked_mode, name_run
from nanochat.training.continuing import refuse_other_run
from nanochat.training.loop import Cadence, Progress, ResumePoint, Stage, Trackers, TrainingResult, train
from nanochat.training.watchdog import watched
from nanochat.workspace import Stage as StageName
from nanochat.workspace import Workspace, check_name

# Compiling takes a minute and then saves a sixth to a quarter of the time; uncompiled, a core trains at this speed
# (d4 in bfloat16; both in benchmarks/LOG.md, 2026-11-25).
COMPILING_PAYS_AFTER_SECONDS = 600
EAGER_FLOPS_PER_CORE = 85e9


@dataclass(frozen=True)
class TrainingInputs:
    """What a stage reads, opened and verified."""

    tokenizer: Tokenizer
    train: TokenDataset
    val: TokenDataset

    @classmethod
    def open(cls, workspace: Workspace, folder: Path, fix: str) -> "TrainingInputs":
        """Open the tokenizer and a folder of token shards; `fix` is the command that makes the latter.

        Raises:
            DataError: something is missing, damaged, or made with another tokenizer.
        """
        tokenizer = Tokenizer.load(workspace.tokenizer)
        made_with = read_manifest(folder, MANIFEST_KIND, fix)["tokenizer"]["fingerprint"]
        if made_with != tokenizer.fingerprint:
            raise DataError(
                f"{folder} was made with tokenizer {made_with}, {workspace.tokenizer} is {tokenizer.fingerprint}",
                fix,
            )

        def splits(checksums: bool) -> list[TokenDataset]:
            return [TokenDataset.open(folder, split, fix=fix, checksums=checksums) for split in ("train", "val")]

        # Every byte is checked once, by one rank, before anything is trained on it.
        verified = run_on_main(lambda: splits(checksums=True))
        return cls(tokenizer, *(verified or splits(checksums=False)))


def metrics_path(workspace: Workspace, run: str, stage: StageName, model_tag: str) -> Path:
    """Where the metrics of one stage of one model are logged."""
    return workspace.run(run) / stage / check_name(model_tag, "model tag") / "metrics.jsonl"


def checkpoint_to_resume(
    folder: Path, resolved: Mapping[str, Any], runtime: Runtime, console: Console
) -> Checkpoint | None:
    """The checkpoint to carry on from, if there is one.

    Raises:
        UsageError: it belongs to another run, or was made with settings that would train something else.
        DataError: there are checkpoints and none is whole.
    """

    def check(found: Checkpoint) -> None:
        refuse_other_run(found.config, resolved["run"], resolved["identity"], folder)
        console.info(f"carrying on from {found.folder.name} in {folder}")

    return newest_checkpoint(folder, runtime, console, check=check)


def resume_point(checkpoint: Checkpoint | None) -> ResumePoint | None:
    """What the loop restores. Not the checkpoint itself, whose tensors would stay in memory a second time."""
    if checkpoint is None:
        return None
    progress = Progress(**checkpoint.state["progress"])
    return ResumePoint(progress, checkpoint.state["random"], checkpoint.fingerprint)


def cadence_of(config: TrainBaseConfig | TrainChatConfig, num_steps: int) -> Cadence:
    """How long a stage runs and how often it looks, logs and saves."""
    return Cadence(
        num_steps=num_steps,
        log_every=config.log_every,
        eval_every=config.eval_every,
        sample_every=config.sample_every,
        save_every=config.save_every,
        keep_checkpoints=config.keep_checkpoints,
    )


def compiles(machine: MachineConfig, runtime: Runtime, num_flops: float, console: Console) -> bool:
    """Whether to compile. Collective where it depends on the machine.

    Args:
        machine: what was asked for.
        runtime: where the stage computes.
        num_flops: of the whole stage, what is already done included: a run that is carried on chooses as before, on as
            many threads and ranks.
        console: told that the stage is compiled, or why one that should be is not.

    Raises:
        PreflightError: TF32 is set in a way on which compiling fails.
    """
    depends = machine.compile == "auto" and runtime.device.type == "cpu"
    compiled = machine.compile != "off"
    if depends:
        seconds = num_flops / runtime.world_size / torch.get_num_threads() / EAGER_FLOPS_PER_CORE
        # Ranks may have other numbers of threads and nodes other compilers; all do the same.
        compiled = all(gather_from_ranks(seconds > COMPILING_PAYS_AFTER_SECONDS))
    if compiled:
        # Once more: what was imported since the start may have set it.
        check_tf32()
        remove_cut_off_code()
    if compiled and depends:
        failures = [reason for reason in gather_from_ranks(why_not_compile()) if reason is not None]
        if failures:
            console.warning(f"compiled training would be faster, but compiling fails here: {failures[0]}")
        compiled = not failures
    if compiled:
        console.info("compiled: the first step takes a minute or so, and seconds once the cache has its code")
    return compiled


def number_format(machine: MachineConfig, runtime: Runtime) -> str:
    """What a stage computes in, which decides its weights."""
    dtype = str(runtime.compute_dtype).removeprefix("torch.")
    return f"{dtype} with fp8" if machine.fp8 else dtype


def device_rows(rows_per_step: int, device_batch_size: int, runtime: Runtime, console: Console) -> int:
    """Rows per forward pass: what was asked for, or the largest divisor of this rank's share below it."""
    rows = max(1, rows_per_step // runtime.world_size)
    fitting = max(size for size in range(1, min(device_batch_size, rows) + 1) if rows % size == 0)
    if fitting <= min(device_batch_size, rows) // 2:
        console.warning(f"{rows} rows per device divide into passes of {fitting} only; a rounder batch would be faster")
    return fitting


def open_loader(
    data: TokenDataset,
    layout: LoaderConfig,
    device_batch_size: int,
    checkpoint: Checkpoint | None,
    runtime: Runtime,
    console: Console,
) -> BatchLoader:
    """This rank's batches, from where the checkpoint left them or from the first."""
    return BatchLoader(
        data,
        layout,
        device_batch_size=device_rows(layout.rows_per_batch, device_batch_size, runtime, console),
        rank=runtime.rank,
        world_size=runtime.world_size,
        device=runtime.device,
        state=checkpoint.state["loader"] if checkpoint is not None else None,
    )


def train_tracked(
    stage: Stage,
    cadence: Cadence,
    resumed: ResumePoint | None,
    *,
    metrics_file: Path,
    machine: MachineConfig,
    model_tag: str,
    data: TokenDataset,
    workspace: Workspace,
    runtime: Runtime,
    console: Console,
) -> tuple[TrainingResult, LoaderStatistics]:
    """Train with metrics and W&B open, and close both however it ends; the run beats, and a hang ends it.

    Args:
        stage: what to train.
        cadence: how long.
        resumed: where to carry on.
        metrics_file: where metrics go; `run.json` lies beside it.
        machine: who may watch, and when a stage counts as hung.
        model_tag: the model.
        data: what is trained on, to describe it.
        workspace: where W&B's files go.
        runtime: this process.
        console: where lines go.

    Returns:
        How it ended, and what all ranks' loaders delivered.

    Raises:
        UsageError: what was asked for to be tracked with does not exist.
    """
    # On every rank, so that all end alike and none waits for another.
    asked_mode(machine.wandb)
    if machine.tensorboard:
        check_tensorboard()
    with stage.loader, watched(workspace, stage.config["run"], stage.name, runtime, machine.stall_minutes) as heartbeat:
        trackers = Trackers(console, heartbeat=heartbeat)
        if runtime.is_main:
            with MetricsLog(metrics_file) as metrics:
                names = name_run(
                    stage.config["run"],
                    stage.name,
                    project=machine.wandb_project,
                    group=machine.wandb_group,
                    tags=(model_tag, *machine.wandb_tags),
                )
                record = begin_record(
                    metrics_file.parent,
                    names,
                    run=stage.config["run"],
                    stage=stage.name,
                    model_tag=model_tag,
                    num_steps=cadence.num_steps,
                    config={**stage.config, **derived_config(stage, data, runtime)},
                )
                trackers = replace(trackers, metrics=metrics)
                result = _train_recorded(stage, cadence, resumed, trackers, record, machine, workspace, runtime)
        else:
            result = train(stage, cadence, runtime, trackers, resumed)
        return result, _delivered(stage.loader)


def _train_recorded(
    stage: Stage,
    cadence: Cadence,
    resumed: ResumePoint | None,
    trackers: Trackers,
    record: RunRecord,
    machine: MachineConfig,
    workspace: Workspace,
    runtime: Runtime,
) -> TrainingResult:
    assert trackers.metrics is not None
    metrics_file = trackers.metrics.path
    with contextlib.ExitStack() as stack:
        tracked = stack.enter_context(track_run(record, metrics_file.parent, workspace.wandb, machine.wandb))
        trackers = replace(trackers, wandb=tracked.wandb)
        if machine.tensorboard:
            step = resumed.progress.step if resumed is not None else -1
            events = stack.enter_context(EventFiles(metrics_file.parent / "tensorboard", metrics_file, step))
            trackers = replace(trackers, tensorboard=events)
        result = train(stage, cadence, runtime, trackers, resumed)
        tracked.final = {keys.final(name): value for name, value in result.evaluation.items()}
    return result


def derived_config(stage: Stage, data: TokenDataset, runtime: Runtime) -> dict[str, Any]:
    """What follows from the settings and the machine, flat, so that each is a column of W&B's table of runs."""
    environment = stage.config["environment"]
    commit, slurm = environment.get("git", {}), environment.get("slurm", {})
    parameters = {f"model/{part}_params_M": count / 1e6 for part, count in stage.model.parameter_counts().items()}
    return {
        **parameters,
        "model/flops_per_token": stage.flops_per_token,
        "train/tokens_per_step": stage.tokens_per_step,
        "data/num_shards": data.num_shards,
        "data/documents": data.num_documents,
        "data/tokens": data.num_tokens,
        "data/fingerprint": data.fingerprint,
        "runtime/world_size": runtime.world_size,
        "runtime/device": environment["gpus"][0]["name"] if environment.get("gpus") else environment["cpu"]["model"],
        "runtime/image": environment.get("image", {}).get("fingerprint", "none"),
        "runtime/git_commit": commit.get("commit", "unknown"),
        "runtime/git_dirty": commit.get("dirty", False),
        **{f"slurm/{name}": value for name, value in slurm.items()},
    }


def _delivered(loader: BatchLoader) -> LoaderStatistics:
    delivered: list[LoaderStatistics] = gather_from_ranks(loader.statistics())
    return functools.reduce(operator.add, delivered)


def result_figures(stage: Stage, result: TrainingResult, runtime: Runtime) -> dict[str, Value]:
    """What every stage has to say of its training, for the report."""
    progress = result.progress
    tokens = progress.step * stage.tokens_per_step
    return {
        "Steps": progress.step,
        "Tokens per step": stage.tokens_per_step,
        "Training tokens": tokens,
        "Training FLOPs": f"{tokens * stage.flops_per_token:.3e}",
        "Skipped steps": progress.skipped_steps,
        "Training time": format_seconds(progress.seconds),
        "Tokens per second": round(tokens / progress.seconds),
        "Peak memory (MiB)": result.peak_memory_bytes // 2**20,
        "Devices": f"{runtime.world_size} × {runtime.device.type}, {stage.config['dtype']}",
        "Attention": stage.config["attention"],
        "Validation bits per byte": round(result.evaluation[keys.BPB], 4),
    }


def write_training_section(
    stage: Stage,
    result: TrainingResult,
    *,
    title: str,
    figures: dict[str, Value],
    baseline: dict[str, float],
    summary: dict[str, Value],
    metrics_file: Path,
    workspace: Workspace,
    gpus: int,
    seconds: float,
) -> None:
    """Draw a stage's plots and store its section of the report."""
    rows = read(metrics_file)
    name = stage.name
    plot_curves(
        workspace.report / f"{name}_loss.png",
        {"loss": series(rows, keys.LOSS), "smoothed loss": series(rows, keys.SMOOTHED_LOSS)},
        title="Training loss",
        xlabel="step",
        ylabel="nats per token",
    )
    plot_curves(
        workspace.report / f"{name}_bpb.png",
        {"validation": series(rows, keys.BPB)},
        title="Validation bits per byte",
        xlabel="step",
        ylabel="bits per byte",
        baseline=baseline,
    )
    plot_curves(
        workspace.report / f"{name}_lr.png",
        {
            "learning rate": series(rows, keys.LR_MULTIPLIER),
            "Muon momentum": series(rows, keys.MUON_MOMENTUM),
        },
        title="Schedules",
        xlabel="step",
        ylabel="fraction of the peak / momentum",
    )
    write_section(
        workspace.report,
        stage.name,
        Section(
            title=title,
            figures=figures,
            config={key: value for key, value in stage.config.items() if key not in ("identity", "environment")},
            plots=[
                Plot(f"{name}_loss.png", "Training loss"),
                Plot(f"{name}_bpb.png", "Validation bits per byte"),
                Plot(f"{name}_lr.png", "Learning rate and momentum"),
            ],
            samples=[Sample(**sample) for sample in result.samples],
            summary=summary,
            gpus=gpus,
            seconds=seconds,
            environment=describe_environment(),
        ),
    )

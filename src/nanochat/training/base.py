"""Pretraining: a GPT from its first weights to the end of its horizon, on the tokens of the workspace."""

import contextlib
import dataclasses
import functools
import operator
import time
from pathlib import Path
from typing import Any, Final

import torch

from nanochat.config import ModelConfig, TrainBaseConfig, model_from_depth
from nanochat.errors import DataError, NanochatError, UsageError
from nanochat.evaluation.bits_per_byte import bits_per_byte, unigram_bits_per_byte
from nanochat.files import lock_folder, read_manifest
from nanochat.loader.batches import BatchLoader, LoaderConfig, validation_rows
from nanochat.loader.token_shards import MANIFEST_KIND as TOKENS_KIND
from nanochat.loader.token_shards import TokenDataset
from nanochat.model.generate import generate
from nanochat.model.gpt import GPT
from nanochat.optim.optimizer import ShardedOptimizer, check_coverage
from nanochat.optim.schedules import ScheduleConfig, schedule_at
from nanochat.runtime import Runtime, from_main, gather_from_ranks, keep_compiled_code, run_on_main, seed_everything
from nanochat.tokenizer.tokenizer import Tokenizer
from nanochat.tracking.console import Console, format_count, format_seconds
from nanochat.tracking.environment import describe_environment
from nanochat.tracking.metrics import MetricsLog, read, series
from nanochat.tracking.plots import plot_curves
from nanochat.tracking.report import Plot, Sample, Section, write_section
from nanochat.tracking.wandb_run import start_wandb
from nanochat.training.checkpoint import Checkpoint, load_checkpoint, load_newest
from nanochat.training.loop import Cadence, Progress, ResumePoint, Stage, Trackers, TrainingResult, train
from nanochat.training.recipe import Recipe, make_recipe, parameter_groups
from nanochat.workspace import Workspace, check_name

STAGE: Final = "base"
FIX_TOKENS = "nanochat data tokenize"
FIX_CHECKPOINT = "train again with another --model-tag"
SAMPLE_PROMPTS = ("The ", "import ", "Return the ", "The capital of France is")
SAMPLE_TOKENS = 48

# Fields that may differ between a checkpoint and the run that resumes it: how fast it computes and how often it looks,
# not what it computes.
FREE_FIELDS = frozenset(
    {"device_batch_size", "eval_every", "eval_tokens", "sample_every", "save_every", "keep_checkpoints", "log_every"}
    | {"device", "dtype", "compile", "wandb"}
)


@dataclasses.dataclass(frozen=True)
class BaseInputs:
    """What pretraining reads, opened and verified."""

    tokenizer: Tokenizer
    train: TokenDataset
    val: TokenDataset

    @classmethod
    def open(cls, workspace: Workspace) -> "BaseInputs":
        """Open tokenizer and token shards.

        Raises:
            DataError: something is missing, damaged, or made with another tokenizer.
        """
        tokenizer = Tokenizer.load(workspace.tokenizer)
        made_with = read_manifest(workspace.tokens, TOKENS_KIND, FIX_TOKENS)["tokenizer"]["fingerprint"]
        if made_with != tokenizer.fingerprint:
            raise DataError(
                f"{workspace.tokens} was made with tokenizer {made_with}, "
                f"{workspace.tokenizer} is {tokenizer.fingerprint}",
                FIX_TOKENS,
            )

        def splits(checksums: bool) -> list[TokenDataset]:
            return [
                TokenDataset.open(workspace.tokens, split, fix=FIX_TOKENS, checksums=checksums)
                for split in ("train", "val")
            ]

        # Every byte is checked once, by one rank, before anything is trained on it.
        verified = run_on_main(lambda: splits(checksums=True))
        return cls(tokenizer, *(verified or splits(checksums=False)))


def train_base(config: TrainBaseConfig, run: str, workspace: Workspace, runtime: Runtime) -> dict[str, Any]:
    """Pretrain, or carry on from the newest checkpoint, and write the report's section.

    One process (or group of ranks) trains a model at a time; a second one is refused.

    Returns:
        What the stage made: checkpoint fingerprint, steps, final metrics.

    Raises:
        UsageError: the settings do not fit each other, or differ from those of the checkpoint to be resumed.
        DataError: inputs are missing or damaged.
        StoppedForRequeueError: a signal stopped the run after a checkpoint.
    """
    folder = workspace.checkpoints(STAGE, config.tag)
    with run_on_main(lambda: lock_folder(folder, f"the model {config.tag}")) or contextlib.nullcontext():
        return _train_base(config, run, workspace, runtime)


def _train_base(config: TrainBaseConfig, run: str, workspace: Workspace, runtime: Runtime) -> dict[str, Any]:
    """Pretrain; the model's folder is locked."""
    started = time.perf_counter()
    console = Console(enabled=runtime.is_main)
    inputs = BaseInputs.open(workspace)
    shape = model_from_depth(
        config.depth,
        inputs.tokenizer.vocab_size,
        config.sequence_len,
        aspect_ratio=config.aspect_ratio,
        head_dim=config.head_dim,
        num_kv_heads=config.num_kv_heads,
        window_pattern=config.window_pattern,
        variant=config.variant,
    )
    recipe = make_recipe(config, shape, inputs.train.num_tokens)
    resolved = resolve(config, run, shape, recipe, inputs, runtime)
    stage, resumed = build_stage(config, shape, recipe, resolved, inputs, workspace, runtime, console)
    counts = stage.model.parameter_counts()
    console.info(
        f"{config.tag}: {format_count(counts['total'])} parameters ({format_count(counts['scaling'])} scaling), "
        f"{recipe.num_steps} steps of {format_count(recipe.total_batch_size)} tokens "
        f"on {runtime.world_size} × {runtime.device.type} in {resolved['identity']['dtype']}"
    )
    with stage.loader:
        result = _train_tracked(stage, config, run, workspace, runtime, console, resumed)
        delivered = functools.reduce(operator.add, gather_from_ranks(stage.loader.statistics()))
    if runtime.is_main:
        unigram = _unigram_baseline(inputs)
        figures = {
            "Parameters": format_count(counts["total"]),
            "Parameters in matrices and head": format_count(counts["scaling"]),
            "Steps": result.progress.step,
            "Tokens per step": recipe.total_batch_size,
            "Training tokens": recipe.total_tokens,
            "Passes over the data": round(delivered.epochs, 3),
            "Tokens cropped": f"{delivered.crop_fraction:.2%}",
            "Training FLOPs": f"{recipe.total_tokens * stage.flops_per_token:.3e}",
            "Validation bits per byte": round(result.evaluation["val/bpb"], 4),
            "Bits per byte of a byte-unigram model": round(unigram, 4),
            "Skipped steps": result.progress.skipped_steps,
            "Training time": format_seconds(result.progress.seconds),
            "Tokens per second": round(recipe.total_tokens / result.progress.seconds),
            "Peak memory (MiB)": result.peak_memory_bytes // 2**20,
            "Devices": f"{runtime.world_size} × {runtime.device.type}, {resolved['identity']['dtype']}",
        }
        seconds = time.perf_counter() - started
        _write_report(workspace, run, config, resolved, result, figures, unigram, seconds)
    return {
        "steps": result.progress.step,
        "fingerprint": result.fingerprint,
        "checkpoints": str(stage.checkpoints.relative_to(workspace.root)),
        "val/bpb": result.evaluation["val/bpb"],
    }


def build_stage(
    config: TrainBaseConfig,
    shape: ModelConfig,
    recipe: Recipe,
    resolved: dict[str, Any],
    inputs: BaseInputs,
    workspace: Workspace,
    runtime: Runtime,
    console: Console,
) -> tuple[Stage, ResumePoint | None]:
    """Put model, optimizer and loader where the newest checkpoint left them, or at the start if there is none."""
    checkpoints = workspace.checkpoints(STAGE, config.tag)
    checkpoint = _newest_checkpoint(checkpoints, resolved, runtime, console)

    seed_everything(config.seed)
    model = GPT(shape, runtime.compute_dtype)
    model.init_weights()
    if checkpoint is not None:
        model.load_state_dict(checkpoint.model)
    model.to(runtime.device)
    compiled = config.compile == "on" or (config.compile == "auto" and runtime.device.type == "cuda")
    if compiled:
        keep_compiled_code(workspace.cache)
    groups = parameter_groups(model, config, recipe)
    check_coverage(model, groups)
    optimizer = ShardedOptimizer(groups, work_dtype=runtime.compute_dtype, compile_muon=compiled)
    if checkpoint is not None:
        optimizer.load_state_dict(checkpoint.optimizer)
    loader = BatchLoader(
        inputs.train,
        LoaderConfig(
            sequence_len=config.sequence_len,
            rows_per_batch=recipe.total_batch_size // config.sequence_len,
            lanes=config.lanes,
            pool_size=config.pool_size,
            seed=config.seed,
            remainders=config.remainders,
        ),
        device_batch_size=_device_rows(config, recipe, runtime, console),
        rank=runtime.rank,
        world_size=runtime.world_size,
        device=runtime.device,
        state=checkpoint.state["loader"] if checkpoint is not None else None,
    )
    rows = validation_rows(inputs.val, config.sequence_len, max(1, config.eval_tokens // config.sequence_len))
    token_bytes = inputs.tokenizer.token_bytes()
    schedule = ScheduleConfig(
        warmup_steps=recipe.warmup_steps,
        warmdown_ratio=config.warmdown_ratio,
        final_lr_fraction=config.final_lr_fraction,
    )
    stage = Stage(
        name=STAGE,
        model=model,
        forward=torch.compile(model, dynamic=False) if compiled else model,
        optimizer=optimizer,
        loader=loader,
        schedule=lambda step: schedule_at(step, recipe.num_steps, schedule),
        evaluate=lambda: {"val/bpb": bits_per_byte(model, rows, token_bytes, runtime, config.device_batch_size)},
        sample=lambda: draw_samples(model, inputs.tokenizer),
        tokens_per_step=recipe.total_batch_size,
        tokens_per_epoch=inputs.train.num_tokens,
        flops_per_token=model.flops_per_token(),
        checkpoints=checkpoints,
        config={**resolved, "environment": describe_environment() if runtime.is_main else {}},
    )
    if checkpoint is None:
        return stage, None
    # Not the checkpoint itself: its tensors would stay in memory, a second time, for the whole run.
    progress = Progress(**checkpoint.state["progress"])
    return stage, ResumePoint(progress, checkpoint.state["random"], checkpoint.fingerprint)


def resolve(
    config: TrainBaseConfig, run: str, shape: ModelConfig, recipe: Recipe, inputs: BaseInputs, runtime: Runtime
) -> dict[str, Any]:
    """Everything that was chosen or derived, JSON-able. `identity` is the part that decides the weights."""
    fields = dataclasses.asdict(config)
    identity = {
        **{name: value for name, value in fields.items() if name not in FREE_FIELDS},
        "model": dataclasses.asdict(shape),
        "recipe": dataclasses.asdict(recipe),
        "dtype": str(runtime.compute_dtype).removeprefix("torch."),
        "tokenizer": inputs.tokenizer.fingerprint,
        "data": inputs.train.fingerprint,
    }
    return {**fields, **identity, "run": run, "world_size": runtime.world_size, "identity": identity}


def draw_samples(model: GPT, tokenizer: Tokenizer) -> list[dict[str, str]]:
    """Continuations of a few fixed prompts, drawn the same way every time.

    Not greedy ones: a small model repeats itself for ever then, which says little about what it has learnt.
    """
    return [
        {
            "prompt": prompt,
            "text": tokenizer.decode(
                generate(
                    model,
                    [tokenizer.bos_id, *tokenizer.encode(prompt)],
                    SAMPLE_TOKENS,
                    temperature=0.8,
                    top_k=50,
                    stop=frozenset({tokenizer.bos_id}),
                )
            ),
        }
        for prompt in SAMPLE_PROMPTS
    ]


def _device_rows(config: TrainBaseConfig, recipe: Recipe, runtime: Runtime, console: Console) -> int:
    """Rows per forward pass: what was asked for, or the largest divisor of this rank's share below it."""
    rows = max(1, recipe.total_batch_size // config.sequence_len // runtime.world_size)
    fitting = max(size for size in range(1, min(config.device_batch_size, rows) + 1) if rows % size == 0)
    if fitting <= min(config.device_batch_size, rows) // 2:
        console.warning(f"{rows} rows per device divide into passes of {fitting} only; a rounder batch would be faster")
    return fitting


def _newest_checkpoint(folder: Path, resolved: dict[str, Any], runtime: Runtime, console: Console) -> Checkpoint | None:
    """Find the checkpoint to carry on from: rank 0 looks and checks, then every rank reads the same one.

    Raises:
        UsageError: it belongs to another run, or was made with settings that would train something else.
        DataError: there are checkpoints and none is whole.
    """

    def find() -> Checkpoint | None:
        found, warnings = load_newest(folder, FIX_CHECKPOINT)
        for warning in warnings:
            console.warning(warning)
        if found is not None:
            _refuse_other_run(found, resolved, folder)
            console.info(f"carrying on from {found.folder.name} in {folder}")
        return found

    found = run_on_main(find)
    step: int | None = from_main(found.step if found is not None else None)
    if step is None or runtime.is_main:
        return found
    return load_checkpoint(folder, step, FIX_CHECKPOINT, checksums=False)


def _refuse_other_run(found: Checkpoint, resolved: dict[str, Any], folder: Path) -> None:
    """A checkpoint continues only the run that it belongs to.

    Under another name it would look as if that run had been trained, without a step of its own.
    """
    if found.config["run"] != resolved["run"]:
        raise UsageError(
            f"{folder} belongs to the run {found.config['run']!r}",
            f"choose another --model-tag, or carry on with --run {found.config['run']}",
        )
    before, identity = found.config["identity"], resolved["identity"]
    changed = [
        f"{name} {before.get(name)} → {identity.get(name)}"
        for name in sorted(before.keys() | identity.keys())
        if before.get(name) != identity.get(name)
    ]
    if changed:
        raise UsageError(
            f"{folder} holds a run with other settings ({'; '.join(changed)[:400]})",
            "choose another --model-tag, or use the same settings to carry on",
        )


def _train_tracked(
    stage: Stage,
    config: TrainBaseConfig,
    run: str,
    workspace: Workspace,
    runtime: Runtime,
    console: Console,
    resumed: ResumePoint | None,
) -> TrainingResult:
    """Train with metrics and W&B open, and close both however it ends."""
    cadence = Cadence(
        num_steps=stage.config["recipe"]["num_steps"],
        log_every=config.log_every,
        eval_every=config.eval_every,
        sample_every=config.sample_every,
        save_every=config.save_every,
        keep_checkpoints=config.keep_checkpoints,
    )
    if not runtime.is_main:
        return train(stage, cadence, runtime, Trackers(console), resumed)
    with MetricsLog(metrics_path(workspace, run, config.tag)) as metrics:
        wandb = start_wandb(run_name=run, stage=STAGE, config=stage.config, folder=workspace.wandb, mode=config.wandb)
        exit_code = 1
        try:
            result = train(stage, cadence, runtime, Trackers(console, metrics, wandb), resumed)
            wandb.summary({f"final/{name}": value for name, value in result.evaluation.items()})
            exit_code = 0
        except NanochatError as error:
            exit_code = error.exit_code
            raise
        finally:
            wandb.finish(exit_code)
        return result


def metrics_path(workspace: Workspace, run: str, model_tag: str) -> Path:
    """Where the metrics of one model's pretraining are logged."""
    return workspace.run(run) / STAGE / check_name(model_tag, "model tag") / "metrics.jsonl"


def _unigram_baseline(inputs: BaseInputs) -> float:
    """Bits per byte of the validation text under its own byte frequencies."""
    text = b"".join(
        inputs.tokenizer.decode_bytes(inputs.val.document(index)[1:].tolist())
        for index in range(min(inputs.val.num_documents, 1000))
    )
    return unigram_bits_per_byte(text)


def _write_report(
    workspace: Workspace,
    run: str,
    config: TrainBaseConfig,
    resolved: dict[str, Any],
    result: TrainingResult,
    figures: dict[str, Any],
    unigram: float,
    seconds: float,
) -> None:
    """Draw the plots and store the section."""
    rows = read(metrics_path(workspace, run, config.tag))
    plot_curves(
        workspace.report / "base_loss.png",
        {
            "loss": series(rows, "train/loss"),
            "smoothed loss": series(rows, "train/smoothed_loss"),
        },
        title="Training loss",
        xlabel="step",
        ylabel="nats per token",
    )
    plot_curves(
        workspace.report / "base_bpb.png",
        {"validation": series(rows, "val/bpb")},
        title="Validation bits per byte",
        xlabel="step",
        ylabel="bits per byte",
        baseline={"byte-unigram model": unigram},
    )
    plot_curves(
        workspace.report / "base_lr.png",
        {
            "learning rate": series(rows, "train/lr_multiplier"),
            "Muon momentum": series(rows, "train/muon_momentum"),
        },
        title="Schedules",
        xlabel="step",
        ylabel="fraction of the peak / momentum",
    )
    write_section(
        workspace.report,
        STAGE,
        Section(
            title="Base model",
            figures=figures,
            config={key: value for key, value in resolved.items() if key != "identity"},
            plots=[
                Plot("base_loss.png", "Training loss"),
                Plot("base_bpb.png", "Validation bits per byte"),
                Plot("base_lr.png", "Learning rate and momentum"),
            ],
            samples=[Sample(**sample) for sample in result.samples],
            summary={"Bits per byte": round(result.evaluation["val/bpb"], 4)},
            seconds=seconds,
            environment=describe_environment(),
        ),
    )

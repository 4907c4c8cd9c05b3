"""Pretraining: a GPT from its first weights to the end of its horizon, on the tokens of the workspace."""

import contextlib
import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch

from nanochat.config import ModelConfig, TrainBaseConfig
from nanochat.evaluation.bits_per_byte import bits_per_byte, unigram_bits_per_byte
from nanochat.files import lock_folder, use_folders
from nanochat.loader.batches import LoaderConfig, validation_rows
from nanochat.loader.token_shards import TokenDataset
from nanochat.model.attention_choice import choose_attention
from nanochat.model.generate import generate
from nanochat.model.gpt import GPT
from nanochat.optim.optimizer import ShardedOptimizer, check_coverage
from nanochat.optim.schedules import ScheduleConfig, schedule_at
from nanochat.runtime import Runtime, run_on_main, seed_everything
from nanochat.tokenizer.tokenizer import Tokenizer
from nanochat.tracking.console import Console, format_count
from nanochat.tracking.environment import describe_environment
from nanochat.training.continuing import base_identity
from nanochat.training.groups import parameter_groups
from nanochat.training.loop import ResumePoint, Stage
from nanochat.training.recipe import Recipe, base_shape, make_recipe
from nanochat.training.session import (
    TrainingInputs,
    cadence_of,
    checkpoint_to_resume,
    compiles,
    metrics_path,
    number_format,
    open_loader,
    result_figures,
    resume_point,
    train_tracked,
    write_training_section,
)
from nanochat.workspace import Workspace

STAGE: Final = "base"
FIX_TOKENS = "nanochat data tokenize"
SAMPLE_PROMPTS = ("The ", "import ", "Return the ", "The capital of France is")
SAMPLE_TOKENS = 48
NOTHING_MORE: Mapping[str, Path] = MappingProxyType({})


def train_base(
    config: TrainBaseConfig,
    run: str,
    workspace: Workspace,
    runtime: Runtime,
    also_validate: Mapping[str, Path] = NOTHING_MORE,
) -> dict[str, Any]:
    """Pretrain, or carry on from the newest checkpoint, and write the report's section.

    One process (or group of ranks) trains a model at a time; a second one is refused.

    Args:
        also_validate: folders of tokens whose validation split is measured as well, as `epoch/bpb_<name>`.

    Returns:
        What the stage made: checkpoint fingerprint, steps, final metrics.

    Raises:
        UsageError: the settings do not fit each other, or differ from those of the checkpoint to be resumed.
        DataError: inputs are missing or damaged.
        StoppedForRequeueError: a signal stopped the run after a checkpoint.
    """
    folder = workspace.checkpoints(STAGE, config.tag)
    read = (workspace.tokens, workspace.tokenizer) if runtime.is_main else ()
    with (
        run_on_main(lambda: lock_folder(folder, f"the model {config.tag}")) or contextlib.nullcontext(),
        use_folders(f"the training of the base model {config.tag}, run {run}", *read),
    ):
        return _train_base(config, run, workspace, runtime, also_validate)


def _train_base(
    config: TrainBaseConfig, run: str, workspace: Workspace, runtime: Runtime, also_validate: Mapping[str, Path]
) -> dict[str, Any]:
    """Pretrain; the model's folder is locked."""
    started = time.perf_counter()
    console = Console(enabled=runtime.is_main)
    inputs = TrainingInputs.open(workspace, workspace.tokens, FIX_TOKENS)
    shape = base_shape(config, inputs.tokenizer.vocab_size)
    recipe = make_recipe(config, shape, inputs.train.num_tokens)
    resolved = resolve(config, run, shape, recipe, inputs, runtime)
    validation = {"epoch/bpb": inputs.val}
    validation |= {f"epoch/bpb_{name}": TokenDataset.open(path, "val") for name, path in also_validate.items()}
    stage, resumed = build_stage(config, shape, recipe, resolved, inputs, validation, workspace, runtime, console)
    counts = stage.model.parameter_counts()
    console.info(
        f"{config.tag}: {format_count(counts['total'])} parameters ({format_count(counts['scaling'])} scaling), "
        f"{recipe.num_steps} steps of {format_count(recipe.total_batch_size)} tokens "
        f"on {runtime.world_size} × {runtime.device.type} in {resolved['identity']['dtype']}"
    )
    metrics_file = metrics_path(workspace, run, STAGE, config.tag)
    result, delivered = train_tracked(
        stage,
        cadence_of(config, recipe.num_steps),
        resumed,
        metrics_file=metrics_file,
        machine=config,
        model_tag=config.tag,
        data=inputs.train,
        workspace=workspace,
        runtime=runtime,
        console=console,
    )
    if runtime.is_main:
        unigram = _unigram_baseline(inputs)
        write_training_section(
            stage,
            result,
            title="Base model",
            figures={
                "Parameters": format_count(counts["total"]),
                "Parameters in matrices and head": format_count(counts["scaling"]),
                "Passes over the data": round(delivered.epochs, 3),
                "Tokens cropped": f"{delivered.crop_fraction:.2%}",
                **result_figures(stage, result, runtime),
                "Bits per byte of a byte-unigram model": round(unigram, 4),
            },
            baseline={"byte-unigram model": unigram},
            summary={"Bits per byte": round(result.evaluation["epoch/bpb"], 4)},
            metrics_file=metrics_file,
            workspace=workspace,
            gpus=runtime.num_gpus,
            seconds=time.perf_counter() - started,
        )
    return {
        "steps": result.progress.step,
        "fingerprint": result.fingerprint,
        "checkpoints": str(stage.checkpoints.relative_to(workspace.root)),
        "epoch/bpb": result.evaluation["epoch/bpb"],
    }


def build_stage(
    config: TrainBaseConfig,
    shape: ModelConfig,
    recipe: Recipe,
    resolved: dict[str, Any],
    inputs: TrainingInputs,
    validation: Mapping[str, TokenDataset],
    workspace: Workspace,
    runtime: Runtime,
    console: Console,
) -> tuple[Stage, ResumePoint | None]:
    """Put model, optimizer and loader where the newest checkpoint left them, or at the start if there is none."""
    checkpoints = workspace.checkpoints(STAGE, config.tag)
    checkpoint = checkpoint_to_resume(checkpoints, resolved, runtime, console)

    attention = choose_attention(config.attention, shape, runtime)
    console.info(str(attention))
    seed_everything(config.seed)
    model = GPT(shape, runtime.compute_dtype, attention.function)
    model.init_weights()
    if checkpoint is not None:
        model.load_state_dict(checkpoint.model)
    model.to(runtime.device)
    compiled = compiles(config, runtime, recipe.total_tokens * model.flops_per_token(), console)
    if config.fp8:
        model.use_fp8(compiled=compiled)
    groups = parameter_groups(model, config, recipe)
    check_coverage(model, groups)
    optimizer = ShardedOptimizer(
        groups,
        work_dtype=runtime.compute_dtype,
        compile_muon=compiled,
        reduce_dtype=getattr(torch, config.reduce_dtype),
        nodes=runtime.nodes,
    )
    if checkpoint is not None:
        optimizer.load_state_dict(checkpoint.optimizer)
    layout = LoaderConfig(
        sequence_len=config.sequence_len,
        rows_per_batch=recipe.total_batch_size // config.sequence_len,
        lanes=config.lanes,
        pool_size=config.pool_size,
        seed=config.seed,
        remainders=config.remainders,
    )
    max_rows = max(1, config.eval_tokens // config.sequence_len)
    validated = {key: validation_rows(dataset, config.sequence_len, max_rows) for key, dataset in validation.items()}
    token_bytes = inputs.tokenizer.token_bytes()
    schedule = ScheduleConfig(
        warmup_steps=recipe.warmup_steps,
        warmdown_ratio=config.warmdown_ratio,
        final_lr_fraction=config.final_lr_fraction,
    )
    stage = Stage(
        name=STAGE,
        model=model,
        forward=attention.around(torch.compile(model, dynamic=False) if compiled else model),
        optimizer=optimizer,
        loader=open_loader(inputs.train, layout, config.device_batch_size, checkpoint, runtime, console),
        schedule=lambda step: schedule_at(step, recipe.num_steps, schedule),
        evaluate=lambda: {
            key: bits_per_byte(model, rows, token_bytes, runtime, config.device_batch_size)
            for key, rows in validated.items()
        },
        sample=lambda: draw_samples(model, inputs.tokenizer),
        tokens_per_step=recipe.total_batch_size,
        tokens_per_epoch=inputs.train.num_tokens,
        flops_per_token=model.flops_per_token(),
        checkpoints=checkpoints,
        config={
            **resolved,
            "attention": attention.name,
            "compiled": compiled,
            "environment": describe_environment() if runtime.is_main else {},
        },
    )
    return stage, resume_point(checkpoint)


def resolve(
    config: TrainBaseConfig, run: str, shape: ModelConfig, recipe: Recipe, inputs: TrainingInputs, runtime: Runtime
) -> dict[str, Any]:
    """Everything that was chosen or derived, JSON-able. `identity` is the part that decides the weights."""
    fields = dataclasses.asdict(config)
    identity = {
        **base_identity(config, shape, recipe),
        "dtype": number_format(config, runtime),
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


def _unigram_baseline(inputs: TrainingInputs) -> float:
    """Bits per byte of the validation text under its own byte frequencies."""
    text = b"".join(
        inputs.tokenizer.decode_bytes(inputs.val.document(index)[1:].tolist())
        for index in range(min(inputs.val.num_documents, 1000))
    )
    return unigram_bits_per_byte(text)

"""Midtraining and SFT: a model that continues text becomes one that answers.

Both are the same training on other conversations. They go on where the stage before ended, with its weights and, by
default, its optimizer's memory, and they differ from pretraining in three ways: rows hold whole conversations and are
padded, only what the assistant says is trained on, and the learning rates are a fraction of the base model's.
"""

import contextlib
import dataclasses
import math
import time
from typing import Any

import torch

from nanochat.chat.engine import Engine, Sampling
from nanochat.checkpoint.store import Checkpoint
from nanochat.checkpoint.trained_model import choose_model_tag, newest_checkpoint
from nanochat.config import MachineConfig, ModelConfig, TrainBaseConfig, TrainChatConfig
from nanochat.corpus.conversation import user
from nanochat.errors import DataError, UsageError
from nanochat.evaluation.bits_per_byte import bits_per_byte
from nanochat.files import lock_folder, read_manifest, use_folders
from nanochat.loader.batches import LoaderConfig, validation_rows
from nanochat.loader.token_shards import MANIFEST_KIND, TokenDataset
from nanochat.model.attention_choice import choose_attention
from nanochat.model.gpt import GPT
from nanochat.optim.optimizer import ShardedOptimizer, check_coverage
from nanochat.optim.schedules import ScheduleConfig, StepSchedule, schedule_at
from nanochat.runtime import Runtime, run_on_main, seed_everything
from nanochat.tokenizer.conversation import render_prompt
from nanochat.tokenizer.tokenizer import Tokenizer
from nanochat.tracking.console import Console, format_count
from nanochat.tracking.environment import describe_environment
from nanochat.training.continuing import identity_fields
from nanochat.training.groups import parameter_groups
from nanochat.training.loop import ResumePoint, Stage
from nanochat.training.recipe import Recipe, chat_batch_size
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
from nanochat.workspace import ChatStage, Workspace

TITLES: dict[ChatStage, str] = {"mid": "Midtraining", "sft": "Supervised finetuning"}
# Half of base's warm-up, to a lower peak: nanochat's SFT (scripts/chat_sft.py, 2026-07).
MOMENTUM_START, MOMENTUM_PEAK, MOMENTUM_WARMUP_STEPS = 0.85, 0.95, 300
SAMPLE_QUESTIONS = ("Who are you?", "What does `os.path.join` do?", "What is 12 * 7?", "What is the capital of France?")
SAMPLE_TOKENS = 64


@dataclasses.dataclass(frozen=True)
class Source:
    """The finished stage that training goes on from.

    Attributes:
        checkpoint: its last checkpoint.
        shape: of the model.
        base: how the base model was trained, which decides learning rates.
        recipe: with which numbers.
    """

    checkpoint: Checkpoint
    shape: ModelConfig
    base: TrainBaseConfig
    recipe: Recipe


def train_chat(
    stage: ChatStage,
    config: TrainChatConfig,
    machine: MachineConfig,
    run: str,
    model_tag: str | None,
    workspace: Workspace,
    runtime: Runtime,
) -> dict[str, Any]:
    """Train on conversations, or carry on from the newest checkpoint, and write the report's section.

    Args:
        stage: mid or sft.
        config: its settings.
        machine: how the machine is used.
        run: name of the run.
        model_tag: which model; None for the only one that the stage before has trained.
        workspace: where everything is.
        runtime: this process.

    Returns:
        What the stage made: checkpoint fingerprint, steps, final metrics.

    Raises:
        UsageError: the stage before has no finished model, or the settings differ from those of the checkpoint to be
            resumed.
        DataError: inputs are missing, damaged, or made from other conversations.
        StoppedForRequeueError: a signal stopped the run after a checkpoint.
    """
    tag = choose_model_tag(workspace, config.source, model_tag)
    folder = workspace.checkpoints(stage, tag)
    read = (workspace.conversation_tokens(stage), workspace.tokenizer) if runtime.is_main else ()
    with (
        run_on_main(lambda: lock_folder(folder, f"the {stage} model {tag}")) or contextlib.nullcontext(),
        use_folders(f"the training of the {stage} model {tag}, run {run}", *read),
    ):
        return _train_chat(stage, config, machine, run, tag, workspace, runtime)


def _train_chat(
    stage_name: ChatStage,
    config: TrainChatConfig,
    machine: MachineConfig,
    run: str,
    tag: str,
    workspace: Workspace,
    runtime: Runtime,
) -> dict[str, Any]:
    """Train on conversations; the model's folder is locked."""
    started = time.perf_counter()
    console = Console(enabled=runtime.is_main)
    source = open_source(config, tag, workspace, runtime, console)
    inputs = open_conversations(stage_name, config, source.shape, workspace)
    recipe = make_chat_recipe(config, source, inputs.train)
    resolved = resolve(config, machine, run, source, recipe, inputs, runtime)
    stage, resumed = build_stage(
        stage_name, config, machine, tag, source, recipe, resolved, inputs, workspace, runtime, console
    )
    console.info(
        f"{stage_name} of {tag}: {format_count(inputs.train.num_documents)} conversations, "
        f"{recipe.num_steps} steps of {format_count(recipe.total_batch_size)} tokens "
        f"on {runtime.world_size} × {runtime.device.type} in {resolved['dtype']}"
    )
    metrics_file = metrics_path(workspace, run, stage_name, tag)
    result, delivered = train_tracked(
        stage,
        cadence_of(config, recipe.num_steps),
        resumed,
        metrics_file=metrics_file,
        machine=machine,
        model_tag=tag,
        data=inputs.train,
        workspace=workspace,
        runtime=runtime,
        console=console,
    )
    if runtime.is_main:
        totals = read_manifest(workspace.conversation_tokens(stage_name), MANIFEST_KIND, "")["totals"]["train"]
        write_training_section(
            stage,
            result,
            title=TITLES[stage_name],
            figures={
                "Continues": f"{config.source}, step {source.checkpoint.step}",
                "Conversations": inputs.train.num_documents,
                "Conversations cut to the context": totals["cut"],
                "Conversations left out": totals["left_out"],
                "Share of tokens trained on": f"{totals['trained_tokens'] / totals['tokens']:.1%}",
                "Passes over the conversations": round(delivered.epochs, 3),
                "Padding": f"{delivered.padded_fraction:.2%}",
                **result_figures(stage, result, runtime),
            },
            baseline={},
            summary={},
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


def open_source(config: TrainChatConfig, tag: str, workspace: Workspace, runtime: Runtime, console: Console) -> Source:
    """Read the stage before, which must have ended.

    Raises:
        UsageError: it has not.
        DataError: it is damaged.
    """
    folder = workspace.checkpoints(config.source, tag)
    fix = f"nanochat train {config.source} --run my_run"

    def check(found: Checkpoint) -> None:
        horizon = found.config["recipe"]["num_steps"]
        if found.step < horizon:
            raise UsageError(
                f"{folder} is at step {found.step} of {horizon}: what follows would build on half a model",
                f"finish it: nanochat train {config.source} --run {found.config['run']}, with its own flags",
            )

    checkpoint = newest_checkpoint(folder, runtime, console, with_optimizer=config.warm_start, check=check)
    if checkpoint is None:
        raise DataError(f"{folder} holds no whole checkpoint", fix)
    base = checkpoint.config if config.source == "base" else checkpoint.config["base"]
    fields = {field.name for field in dataclasses.fields(TrainBaseConfig)}
    return Source(
        checkpoint=checkpoint,
        shape=ModelConfig(**checkpoint.config["model"]),
        base=TrainBaseConfig(**{name: value for name, value in base.items() if name in fields}),
        recipe=Recipe(**base["recipe"]),
    )


def open_conversations(
    stage: ChatStage, config: TrainChatConfig, shape: ModelConfig, workspace: Workspace
) -> TrainingInputs:
    """Open the stage's token shards.

    Raises:
        DataError: they are missing, damaged, or made from other tasks or for another context.
    """
    folder = workspace.conversation_tokens(stage)
    fix = " ".join([f"nanochat data conversations {stage} --sequence-len {shape.sequence_len} --tasks", *config.tasks])
    manifest = read_manifest(folder, MANIFEST_KIND, fix)
    for name, found, wanted in (
        ("tasks", manifest["made_from"]["tasks"], list(config.tasks)),
        ("a context of", manifest["sequence_len"], shape.sequence_len),
    ):
        if found != wanted:
            raise DataError(f"{folder} was made with {name} {found}, this run has {wanted}", fix)
    return TrainingInputs.open(workspace, folder, fix)


def make_chat_recipe(config: TrainChatConfig, source: Source, data: TokenDataset) -> Recipe:
    """The numbers to train with.

    The square-root rule of `recipe.py` carries the base model's learning rates over to another batch.

    Raises:
        UsageError: the batch is not a whole number of rows.
    """
    batch = chat_batch_size(config, source.recipe.total_batch_size, source.shape.sequence_len)
    # Rows are padded, so a pass takes a little more than this many steps: the report says how much was passed.
    num_steps = config.num_steps or math.ceil((config.target_epochs or 1.0) * data.num_tokens / batch)
    return Recipe(
        num_steps=num_steps,
        total_batch_size=batch,
        lr_scale=source.recipe.lr_scale * config.lr_fraction * math.sqrt(batch / source.recipe.total_batch_size),
        weight_decay=config.weight_decay,
        warmup_steps=min(config.warmup_steps, num_steps // 10),
    )


def resolve(
    config: TrainChatConfig,
    machine: MachineConfig,
    run: str,
    source: Source,
    recipe: Recipe,
    inputs: TrainingInputs,
    runtime: Runtime,
) -> dict[str, Any]:
    """Everything that was chosen or derived, JSON-able. `identity` is the part that decides the weights."""
    fields = dataclasses.asdict(config)
    identity = {
        **identity_fields(fields),
        "tasks": list(config.tasks),
        "model": dataclasses.asdict(source.shape),
        "recipe": dataclasses.asdict(recipe),
        "dtype": number_format(machine, runtime),
        "tokenizer": inputs.tokenizer.fingerprint,
        "data": inputs.train.fingerprint,
        "source_checkpoint": source.checkpoint.tensors_fingerprint,
    }
    base = {**dataclasses.asdict(source.base), "recipe": dataclasses.asdict(source.recipe)}
    chosen = {**fields, **dataclasses.asdict(machine), **identity}
    return {**chosen, "base": base, "run": run, "world_size": runtime.world_size, "identity": identity}


def build_stage(
    name: ChatStage,
    config: TrainChatConfig,
    machine: MachineConfig,
    tag: str,
    source: Source,
    recipe: Recipe,
    resolved: dict[str, Any],
    inputs: TrainingInputs,
    workspace: Workspace,
    runtime: Runtime,
    console: Console,
) -> tuple[Stage, ResumePoint | None]:
    """Put model, optimizer and loader where the newest checkpoint left them, or where the stage before ended."""
    checkpoints = workspace.checkpoints(name, tag)
    checkpoint = checkpoint_to_resume(checkpoints, resolved, runtime, console)
    sequence_len = source.shape.sequence_len

    attention = choose_attention(machine.attention, source.shape, runtime)
    console.info(str(attention))
    seed_everything(config.seed)
    model = GPT(source.shape, runtime.compute_dtype, attention.function)
    model.load_state_dict((checkpoint or source.checkpoint).model)
    model.to(runtime.device)
    compiled = compiles(machine, runtime, recipe.total_tokens * model.flops_per_token(), console)
    if machine.fp8:
        model.use_fp8(compiled=compiled)
    groups = parameter_groups(model, source.base, recipe)
    check_coverage(model, groups)
    optimizer = ShardedOptimizer(
        groups,
        work_dtype=runtime.compute_dtype,
        compile_muon=compiled,
        reduce_dtype=getattr(torch, machine.reduce_dtype),
        nodes=runtime.nodes,
    )
    if checkpoint is not None:
        optimizer.load_state_dict(checkpoint.optimizer)
    elif config.warm_start:
        optimizer.load_state_dict(source.checkpoint.optimizer)
    layout = LoaderConfig(
        sequence_len=sequence_len,
        rows_per_batch=recipe.total_batch_size // sequence_len,
        lanes=config.lanes,
        pool_size=config.pool_size,
        seed=config.seed,
        remainders="pad",
    )
    rows = validation_rows(inputs.val, sequence_len, max(1, config.eval_tokens // sequence_len), remainders="pad")
    token_bytes = inputs.tokenizer.token_bytes()
    shape = ScheduleConfig(
        warmup_steps=recipe.warmup_steps,
        warmdown_ratio=config.warmdown_ratio,
        final_lr_fraction=0.0,
        momentum_start=MOMENTUM_START,
        momentum_peak=MOMENTUM_PEAK,
        momentum_end=MOMENTUM_PEAK,
        momentum_warmup_steps=MOMENTUM_WARMUP_STEPS,
    )

    def schedule(step: int) -> StepSchedule:
        return schedule_at(step, recipe.num_steps, shape)

    stage = Stage(
        name=name,
        model=model,
        forward=attention.around(torch.compile(model, dynamic=False) if compiled else model),
        optimizer=optimizer,
        loader=open_loader(inputs.train, layout, config.device_batch_size, checkpoint, runtime, console),
        schedule=schedule,
        evaluate=lambda: {"epoch/bpb": bits_per_byte(model, rows, token_bytes, runtime, config.device_batch_size)},
        sample=lambda: draw_answers(model, inputs.tokenizer),
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


def draw_answers(model: GPT, tokenizer: Tokenizer) -> list[dict[str, str]]:
    """The likeliest answers to a few fixed questions."""
    limit = model.config.sequence_len
    prompts = [
        render_prompt(tokenizer, [user(question)], max_tokens=max(8, limit - SAMPLE_TOKENS))
        for question in SAMPLE_QUESTIONS
    ]
    answers = Engine(model, tokenizer).generate(prompts, Sampling(max_new_tokens=SAMPLE_TOKENS))
    return [
        {"prompt": question, "text": tokenizer.decode(answer)}
        for question, answer in zip(SAMPLE_QUESTIONS, answers, strict=True)
    ]

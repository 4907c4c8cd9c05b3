"""A trained model from its newest good checkpoint, ready to be talked to, examined or exported."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.checkpoint.folders import list_steps
from nanochat.checkpoint.store import Checkpoint, load_checkpoint, load_newest
from nanochat.config import ModelConfig
from nanochat.errors import DataError, UsageError
from nanochat.model.attention_choice import choose_attention
from nanochat.model.gpt import GPT
from nanochat.runtime import Runtime, from_main, run_on_main
from nanochat.tokenizer.tokenizer import Tokenizer
from nanochat.tracking.console import Console
from nanochat.workspace import CHECKPOINT_FOLDERS, Stage, Workspace

FIX_CHECKPOINT = "train again with another --model-tag"


@dataclass(frozen=True)
class TrainedModel:
    """A model with its tokenizer and where it comes from.

    Attributes:
        model: on the runtime's device, in its compute dtype, weights float32, in evaluation mode.
        tokenizer: the one it was trained with.
        stage: the stage that trained it last.
        tag: the model's name.
        step: optimizer steps of that stage.
        config: the whole resolved configuration of that stage.
        fingerprint: of the checkpoint's weights and optimizer state.
    """

    model: GPT
    tokenizer: Tokenizer
    stage: Stage
    tag: str
    step: int
    config: dict[str, Any]
    fingerprint: str


def model_tags(workspace: Workspace, stage: Stage) -> list[str]:
    """The models that have a checkpoint of a stage, in alphabetical order."""
    parent = workspace.root / CHECKPOINT_FOLDERS[stage]
    folders = sorted(parent.iterdir()) if parent.is_dir() else []
    return [folder.name for folder in folders if list_steps(folder)]


def choose_model_tag(workspace: Workspace, stage: Stage, model_tag: str | None) -> str:
    """The model that is meant: the one named, or the only one there is.

    Raises:
        UsageError: there is none, or there are several and none is named.
    """
    tags = model_tags(workspace, stage)
    missing = f"make it: nanochat train {stage} --run my_run"
    if model_tag is not None:
        if model_tag not in tags:
            there = f"; there are: {', '.join(tags)}" if tags else ""
            raise UsageError(f"{workspace.checkpoints(stage, model_tag)} holds no {stage} checkpoint{there}", missing)
        return model_tag
    if not tags:
        raise UsageError(f"{workspace.root / CHECKPOINT_FOLDERS[stage]} holds no {stage} checkpoint", missing)
    if len(tags) > 1:
        raise UsageError(f"there are several {stage} models: {', '.join(tags)}", f"choose one: --model-tag {tags[-1]}")
    return tags[0]


def newest_checkpoint(
    folder: Path,
    runtime: Runtime,
    console: Console,
    *,
    with_optimizer: bool = True,
    check: Callable[[Checkpoint], None] = lambda checkpoint: None,
) -> Checkpoint | None:
    """The newest good checkpoint: rank 0 looks and checks every byte, then every rank reads the same one.

    Damaged newer ones are set aside, with a warning.

    Args:
        check: called with it on rank 0; what it raises ends all ranks.

    Raises:
        DataError: there are checkpoints and none is whole.
    """

    def find() -> Checkpoint | None:
        found, warnings = load_newest(folder, FIX_CHECKPOINT, with_optimizer=with_optimizer)
        for warning in warnings:
            console.warning(warning)
        if found is not None:
            check(found)
        return found

    found = run_on_main(find)
    step: int | None = from_main(found.step if found is not None else None)
    if step is None or runtime.is_main:
        return found
    return load_checkpoint(folder, step, FIX_CHECKPOINT, checksums=False, with_optimizer=with_optimizer)


def load_trained_model(
    workspace: Workspace, stage: Stage, model_tag: str | None, runtime: Runtime, console: Console
) -> TrainedModel:
    """Load a model of a stage from its newest good checkpoint.

    Args:
        model_tag: which one; None for the only one there is.

    Raises:
        UsageError: there is no such checkpoint; the error names the command that makes it.
        DataError: every checkpoint is damaged, or the workspace has another tokenizer by now.
    """
    tag = choose_model_tag(workspace, stage, model_tag)
    folder = workspace.checkpoints(stage, tag)
    checkpoint = newest_checkpoint(folder, runtime, console, with_optimizer=False)
    if checkpoint is None:
        raise DataError(f"{folder} holds no whole checkpoint", f"nanochat train {stage} --run my_run")
    tokenizer = Tokenizer.load(workspace.tokenizer)
    trained_with = checkpoint.config["identity"]["tokenizer"]
    if tokenizer.fingerprint != trained_with:
        raise DataError(
            f"{checkpoint.folder} was trained with tokenizer {trained_with}, "
            f"{workspace.tokenizer} is {tokenizer.fingerprint}",
            "restore that tokenizer, or train again",
        )
    shape = ModelConfig(**checkpoint.config["identity"]["model"])
    model = GPT(shape, runtime.compute_dtype, choose_attention("auto", shape, runtime).function)
    model.load_state_dict(checkpoint.model)
    model.to(runtime.device).eval()
    return TrainedModel(
        model, tokenizer, stage, tag, checkpoint.step, checkpoint.config, checkpoint.tensors_fingerprint
    )

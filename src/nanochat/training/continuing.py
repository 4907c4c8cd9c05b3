"""Which run a checkpoint belongs to, and so which run may carry on from it."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanochat.config import ModelConfig, TrainBaseConfig
from nanochat.errors import UsageError
from nanochat.training.recipe import Recipe

# Fields that may differ between a checkpoint and the run that resumes it: how fast it computes and how often it looks,
# not what it computes.
FREE_FIELDS = frozenset(
    {"device_batch_size", "eval_every", "eval_tokens", "sample_every", "save_every", "keep_checkpoints", "log_every"}
    | {"device", "dtype", "fp8", "compile", "attention", "reduce_dtype", "stall_minutes"}
    | {"wandb", "wandb_project", "wandb_group", "wandb_tags", "tensorboard"}
)


def identity_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that decide the weights: all but `FREE_FIELDS`."""
    return {name: value for name, value in fields.items() if name not in FREE_FIELDS}


def base_identity(config: TrainBaseConfig, shape: ModelConfig, recipe: Recipe) -> dict[str, Any]:
    """What decides a base model's weights, but for the type it computes in, the tokenizer and the data."""
    return {
        **identity_fields(dataclasses.asdict(config)),
        "model": dataclasses.asdict(shape),
        "recipe": dataclasses.asdict(recipe),
    }


def refuse_other_run(found: Mapping[str, Any], run: str, identity: Mapping[str, Any], folder: Path) -> None:
    """A checkpoint continues only the run that it belongs to.

    Under another name it would look as if that run had been trained, without a step of its own.

    Args:
        found: the checkpoint's configuration.
        run: the run that wants to carry on from it.
        identity: what decides that run's weights.
        folder: where the checkpoint is.

    Raises:
        UsageError: it belongs to another run, or was made with settings that would train something else.
    """
    if found["run"] != run:
        raise UsageError(
            f"{folder} belongs to the run {found['run']!r}",
            f"choose another --model-tag, or carry on with --run {found['run']}",
        )
    before = found["identity"]
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

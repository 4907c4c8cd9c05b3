"""Single stages of training."""

from typing import Literal

from tyro.conf import OmitArgPrefixes

from nanochat.commands.options import run_name
from nanochat.config import MachineConfig, TrainBaseConfig, TrainChatConfig, TrainMidConfig, TrainSFTConfig
from nanochat.workspace import Workspace


def train_base(config: OmitArgPrefixes[TrainBaseConfig], *, run: str = "") -> None:
    """Pretrain a base model on the token shards; carries on from its newest checkpoint.

    Args:
        config: the model and its training.
        run: name of the run; default: the environment's WANDB_RUN. It never changes what is trained.
    """
    from nanochat.runtime import start_runtime
    from nanochat.training.base import train_base as train

    name = run_name(run)
    workspace = Workspace.from_environment()
    with start_runtime(config.device, config.dtype, cache=workspace.cache) as runtime:
        train(config, name, workspace, runtime)


def train_mid(
    config: OmitArgPrefixes[TrainMidConfig],
    machine: OmitArgPrefixes[MachineConfig],
    *,
    model_tag: str | None = None,
    run: str = "",
) -> None:
    """Midtrain a base model on conversations; carries on from its newest checkpoint.

    Args:
        config: the training.
        machine: how the machine is used.
        model_tag: which model; default: the only one there is.
        run: name of the run; default: the environment's WANDB_RUN. It never changes what is trained.
    """
    _train_chat("mid", config, machine, model_tag, run)


def train_sft(
    config: OmitArgPrefixes[TrainSFTConfig],
    machine: OmitArgPrefixes[MachineConfig],
    *,
    model_tag: str | None = None,
    run: str = "",
) -> None:
    """Finetune a midtrained model on conversations; carries on from its newest checkpoint.

    Args:
        config: the training.
        machine: how the machine is used.
        model_tag: which model; default: the only one there is.
        run: name of the run; default: the environment's WANDB_RUN. It never changes what is trained.
    """
    _train_chat("sft", config, machine, model_tag, run)


def _train_chat(
    stage: Literal["mid", "sft"], config: TrainChatConfig, machine: MachineConfig, model_tag: str | None, run: str
) -> None:
    from nanochat.runtime import start_runtime
    from nanochat.training.chat import train_chat

    name = run_name(run)
    workspace = Workspace.from_environment()
    with start_runtime(machine.device, machine.dtype, cache=workspace.cache) as runtime:
        train_chat(stage, config, machine, name, model_tag, workspace, runtime)

"""What several commands understand alike."""

import os
from dataclasses import dataclass, fields
from typing import Annotated

from tyro.conf import OmitArgPrefixes, arg

from nanochat.config import EvalConfig, RunConfig, TokenizerConfig, TrainBaseConfig, TrainMidConfig, TrainSFTConfig
from nanochat.workspace import check_run_name


@dataclass(frozen=True)
class SpeedrunSettings:
    """A whole run, as the commands that run or check one understand it."""

    base: OmitArgPrefixes[TrainBaseConfig]
    """the base model, and how all stages use the machine."""
    tokenizer: OmitArgPrefixes[TokenizerConfig]
    """the tokenizer."""
    mid: TrainMidConfig
    """midtraining."""
    sft: TrainSFTConfig
    """supervised finetuning."""
    evaluation: Annotated[EvalConfig, arg(name="eval")]
    """what the models are examined with."""
    run: str = ""
    """name of the run; default: the environment's WANDB_RUN. It never changes what is trained."""
    data: str = "existing"
    """`existing` for the shards in base_data, `builtin` for the built-in text, or a folder of text."""
    stages: tuple[str, ...] = ()
    """which stages, of corpus,tokenizer,tokenize,base,mid,sft,eval,report; default: all."""
    gpu_hour_price: float | None = None
    """what an hour of one GPU costs, for the report."""
    workers: int | None = None
    """processes that tokenise; default: one per core."""

    def config(self, run: str) -> RunConfig:
        """The settings of a run of this name."""
        same = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in ("run", "stages")}
        return RunConfig(run=run, **same)


def run_name(given: str) -> str:
    """The name of a run: as given, or else as WANDB_RUN says, which Slurm users are used to set.

    Raises:
        UsageError: neither names a run.
    """
    return check_run_name(given_name(given))


def given_name(given: str) -> str:
    """The same, whether or not it can name a run."""
    return given or os.environ.get("WANDB_RUN", "")

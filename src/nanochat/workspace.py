"""Where everything lives: the only module that knows the names below NANOCHAT_BASE_DIR."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nanochat.errors import UsageError

Stage = Literal["base", "mid", "sft", "rl"]
ChatStage = Literal["mid", "sft"]

CHECKPOINT_FOLDERS: dict[Stage, str] = {
    "base": "base_checkpoints",
    "mid": "mid_checkpoints",
    "sft": "chatsft_checkpoints",
    "rl": "chatrl_checkpoints",
}

# Names become folder names, W&B names and Slurm job names, so they keep to what all three accept.
SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def check_name(name: str, what: str) -> str:
    """Return `name` if it is safe as a file name.

    Raises:
        UsageError: it is empty, too long, or could leave its folder.
    """
    if not SAFE_NAME.fullmatch(name):
        raise UsageError(
            f"{what} {name!r} is not usable as a file name",
            "use letters, digits, '.', '_' and '-', starting with a letter or digit, 128 characters at most",
        )
    return name


def check_run_name(name: str) -> str:
    """Return a run's name if it can name one.

    `dummy` is refused because other trainers read it as "do not train or log this stage", and people lost
    jobs to it; here a name never changes what is trained.

    Raises:
        UsageError: it is empty, `dummy`, or not usable as a file name.
    """
    if name.strip() == "" or name == "dummy":
        raise UsageError(
            f"run name {name!r} names nothing: its results could not be found again",
            "choose one, for example --run my_first_run (or WANDB_RUN=my_first_run)",
        )
    return check_name(name, "run name")


@dataclass(frozen=True)
class Workspace:
    """Every path of one workspace. Nothing is created by asking for a path."""

    root: Path

    @classmethod
    def from_environment(cls) -> "Workspace":
        """The workspace at NANOCHAT_BASE_DIR, by default `~/.cache/nanochat`.

        Raises:
            UsageError: the variable is set but empty, as an unset shell variable in a script leaves it.
        """
        value = os.environ.get("NANOCHAT_BASE_DIR")
        if value is not None and value.strip() == "":
            raise UsageError("NANOCHAT_BASE_DIR is set but empty", "unset it, or set it to a folder on scratch")
        return cls(Path(value).expanduser().absolute() if value else Path.home() / ".cache" / "nanochat")

    @property
    def base_data(self) -> Path:
        """Parquet shards of raw text and their manifest; the last shard is the validation set."""
        return self.root / "base_data"

    @property
    def tokens(self) -> Path:
        """Memory-mapped token shards made from `base_data` by the tokenizer of this workspace."""
        return self.root / "tokens"

    @property
    def task_data(self) -> Path:
        """Data sets of conversations and problems as the hub has them, one folder each."""
        return self.root / "task_data"

    def conversation_tokens(self, stage: Stage) -> Path:
        """Memory-mapped token shards of the conversations that a stage trains on."""
        return self.root / "conversation_tokens" / stage

    @property
    def tokenizer(self) -> Path:
        """The trained tokenizer, as data."""
        return self.root / "tokenizer"

    @property
    def eval_bundle(self) -> Path:
        """nanochat's evaluation bundle, unpacked: `core.yaml`, `eval_meta_data.csv`, `eval_data/`."""
        return self.root / "eval_bundle"

    @property
    def encodings(self) -> Path:
        """GPT-2's and GPT-4's vocabularies, to compare tokenizers with, under the names that tiktoken's cache uses."""
        return self.root / "encodings"

    @property
    def inventory(self) -> Path:
        """What was staged for machines without network: every file, its size and checksum, and where it came from."""
        return self.root / "inventory.json"

    @property
    def report(self) -> Path:
        """`report.md`, its plots, and the JSON it is rendered from."""
        return self.root / "report"

    @property
    def wandb(self) -> Path:
        """W&B run folders (WANDB_DIR points here unless the user set it)."""
        return self.root / "wandb"

    @property
    def downloads(self) -> Path:
        """Files from elsewhere as they were there, before something was made of them; safe to delete."""
        return self.root / "downloads"

    @property
    def cache(self) -> Path:
        """Compiler caches (inductor, triton), safe to delete."""
        return self.root / "cache"

    def run(self, name: str) -> Path:
        """One run's records: stages, metrics, heartbeat."""
        return self.root / "runs" / check_run_name(name)

    def checkpoints(self, stage: Stage, model_tag: str) -> Path:
        """The folder of one model's `step_NNNNNN/` checkpoints of one stage."""
        return self.root / CHECKPOINT_FOLDERS[stage] / check_name(model_tag, "model tag")

    def evaluations(self, stage: Stage, model_tag: str) -> Path:
        """The folder of one model's evaluation results of one stage."""
        return self.root / "evaluations" / stage / check_name(model_tag, "model tag")

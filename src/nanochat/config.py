"""What can be chosen, with units and defaults. One dial, `depth`, derives the rest of a model.

Nothing here imports torch: help and preflight read these classes on login nodes, in milliseconds.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from nanochat.errors import UsageError

Variant = Literal["modern", "classic"]
AttentionName = Literal["auto", "fa3", "fa4", "varlen", "sdpa"]
Remainders = Literal["keep", "drop"]
StageName = Literal["corpus", "tokenizer", "tokenize", "base", "mid", "sft", "eval", "report"]
ALL_STAGES: tuple[StageName, ...] = get_args(StageName)
# What torch.manual_seed takes.
LARGEST_SEED = 2**63 - 1


def stage_names(values: Sequence[str]) -> tuple[StageName, ...]:
    """The stages named, one word each or joined by commas, in the order of the pipeline; all if none is.

    Raises:
        UsageError: one is not a stage.
    """
    named = [name for value in values for name in value.split(",") if name]
    unknown = [name for name in named if name not in ALL_STAGES]
    if unknown:
        raise UsageError(f"there is no stage {unknown[0]!r}", f"choose of {','.join(ALL_STAGES)}")
    return tuple(stage for stage in ALL_STAGES if stage in named) if named else ALL_STAGES


# Channels that the smear gate and the value-embedding gates read (nanochat's gpt.py, 2026-07).
SMEAR_GATE_CHANNELS = 24
VALUE_GATE_CHANNELS = 12


@dataclass(frozen=True)
class ModelConfig:
    """The shape of one GPT. Everything that changes its weights or outputs, and nothing else."""

    vocab_size: int
    sequence_len: int = 2048
    n_layer: int = 12
    n_head: int = 6
    n_kv_head: int = 6
    n_embd: int = 768
    window_pattern: str = "SSSL"
    variant: Variant = "modern"

    def __post_init__(self) -> None:
        """Refuse shapes that cannot be built, naming the number to change."""
        if self.n_embd % self.n_head:
            raise UsageError(f"width {self.n_embd} is not divisible by {self.n_head} heads", "change --head-dim")
        if (self.n_embd // self.n_head) % 2:
            raise UsageError(f"head dimension {self.n_embd // self.n_head} is odd", "rotary needs an even one")
        if self.n_head % self.n_kv_head:
            raise UsageError(
                f"{self.n_head} query heads cannot share {self.n_kv_head} key/value heads",
                f"choose a --num-kv-heads that divides {self.n_head}",
            )
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            raise UsageError(
                f"window pattern {self.window_pattern!r} has letters other than S and L", "for example SSSL"
            )
        if self.variant == "modern" and self.n_embd < SMEAR_GATE_CHANNELS:
            raise UsageError(f"width {self.n_embd} is below {SMEAR_GATE_CHANNELS}", "raise --depth")

    @property
    def head_dim(self) -> int:
        """Channels per attention head."""
        return self.n_embd // self.n_head

    @property
    def windows(self) -> tuple[int, ...]:
        """How many earlier tokens each layer sees; the sequence length means all of them.

        S is a quarter of the context rounded up to 128, the tile that attention kernels skip by. The last layer
        always sees everything, and the classic variant has no windows at all.
        """
        if self.variant == "classic":
            return (self.sequence_len,) * self.n_layer
        short = min(-(-self.sequence_len // 4 // 128) * 128, self.sequence_len)
        pattern = (self.window_pattern * self.n_layer)[: self.n_layer - 1] + "L"
        return tuple(short if letter == "S" else self.sequence_len for letter in pattern)

    def has_value_embedding(self, layer: int) -> bool:
        """Whether a layer mixes a value embedding in: every other layer, the last one included."""
        return self.variant == "modern" and layer % 2 == (self.n_layer - 1) % 2


def model_from_depth(
    depth: int,
    vocab_size: int,
    sequence_len: int,
    *,
    aspect_ratio: int = 64,
    head_dim: int = 128,
    num_kv_heads: int | None = None,
    window_pattern: str = "SSSL",
    variant: Variant = "modern",
) -> ModelConfig:
    """Derive a model from one dial: width = depth × aspect ratio, rounded up to whole heads.

    Raises:
        UsageError: the numbers do not make a model.
    """
    if depth < 1:
        raise UsageError(f"a model of depth {depth} has no layers", "choose --depth 1 or more")
    n_head = -(-depth * aspect_ratio // head_dim)
    return ModelConfig(
        vocab_size=vocab_size,
        sequence_len=sequence_len,
        n_layer=depth,
        n_head=n_head,
        n_kv_head=num_kv_heads or n_head,
        n_embd=n_head * head_dim,
        window_pattern=window_pattern,
        variant=variant,
    )


@dataclass(frozen=True)
class TokenizerConfig:
    """How the tokenizer is trained."""

    vocab_size: int = 32768
    """Tokens, special tokens included. At most 65536, so that a token fits in two bytes."""
    digit_group: int = 2
    """Longest run of digits in one token: 1, 2 or 3."""
    max_chars: int = 2_000_000_000
    """Train on at most this many characters of the training shards."""
    doc_cap: int = 10_000
    """Use at most this many characters of one document, so that no single one dominates."""


@dataclass(frozen=True)
class MachineConfig:
    """How a stage uses the machine it runs on, and who may watch. What it trains does not depend on it."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train. auto: the GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of activations and matmuls; weights and optimizer stay float32. auto: bfloat16 where it is fast."""
    fp8: bool = False
    """Train the block matrices with products in fp8, on GPUs from Ada and Hopper on; pays from about depth 20 on.
    Values are scaled per forward pass: another --device-batch-size gives a slightly different result."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile. auto: on a GPU; on a CPU, 1.2 to 1.35 times as fast after a minute of compiling, in stages
    that are estimated at more than ten minutes."""
    attention: AttentionName = "auto"
    """Attention kernels: FlashAttention 3 or 4, PyTorch's for GPUs, or for all devices. auto: the first of them that is
    there and exact."""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which gradients travel between ranks. bfloat16 halves what a slow network has to carry, and rounds."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """W&B mode. auto: what WANDB_MODE says, else online where there is a key and W&B answers, else offline."""
    wandb_project: str | None = None
    """W&B project. Default: WANDB_PROJECT, or `nanochat`."""
    wandb_group: str | None = None
    """Shown together in W&B. Default: WANDB_RUN_GROUP, or the run."""
    wandb_tags: tuple[str, ...] = ()
    """W&B tags, beside the model's tag and those of WANDB_TAGS."""
    tensorboard: bool = False
    """Also write TensorBoard event files, beside metrics.jsonl. Needs the package tensorboard."""
    stall_minutes: float = 15.0
    """Minutes without a step, an evaluation's batch or a checkpoint after which a stage ends as hung; 0 for never. Four
    times as long for the first step and for a checkpoint."""


@dataclass(frozen=True)
class TrainBaseConfig(MachineConfig):
    """Pretraining. Leave a value out and the scaling rules choose it for the horizon that is actually run."""

    depth: int = 20
    """Layers. The one dial: width, heads, batch size, learning rates and horizon follow from it."""
    aspect_ratio: int = 64
    """Width per layer of depth, in channels."""
    head_dim: int = 128
    """Channels per attention head."""
    num_kv_heads: int | None = None
    """Key/value heads shared by the query heads (GQA). Default: as many as query heads."""
    sequence_len: int = 2048
    """Context, in tokens."""
    window_pattern: str = "SSSL"
    """Attention windows, tiled over the layers: S sees a quarter of the context, L all of it."""
    variant: Variant = "modern"
    """`classic` is exactly the architecture that transformers' NanoChatForCausalLM loads."""
    model_tag: str | None = None
    """Name of the checkpoint folder. Default: d<depth>, with the variant if it is not modern."""

    num_steps: int | None = None
    """Horizon: optimizer steps."""
    target_flops: float | None = None
    """Horizon: training FLOPs, for example 1e19."""
    target_epochs: float | None = None
    """Horizon: passes over the training data; 1 is one pass."""
    data_param_ratio: float | None = None
    """Horizon: training tokens per scaling parameter (block matrices + lm_head). Used, at 12, if no other is given."""

    device_batch_size: int = 32
    """Rows per forward pass on one device. Lower it when memory runs out; the result stays the same."""
    total_batch_size: int | None = None
    """Tokens per optimizer step over all devices. Default: from the horizon."""
    embedding_lr: float = 0.3
    """Learning rate of the token embedding, at width 768 and the reference batch."""
    unembedding_lr: float = 0.008
    """Learning rate of lm_head, at width 768 and the reference batch."""
    matrix_lr: float = 0.02
    """Learning rate of the block matrices (Muon), at the reference batch."""
    scalar_lr: float = 0.5
    """Learning rate of the per-layer scalars, at the reference batch."""
    weight_decay: float = 0.28
    """Weight decay of the block matrices for a d12 at its reference horizon; scaled to the run's own."""
    scale_hyperparameters: bool = True
    """Scale learning rates and weight decay with batch and horizon. Off: use them as given."""
    warmup_steps: int = 40
    """Steps of linear learning-rate warm-up, at most a tenth of the horizon."""
    warmdown_ratio: float = 0.65
    """Share of the horizon over which the learning rate falls."""
    final_lr_fraction: float = 0.05
    """Learning rate at the end, as a fraction of the peak."""

    seed: int = 42
    """Decides the initial weights and the order of the data."""
    lanes: int = 64
    """Independent streams of rows. The number of devices must divide it; the result does not depend on them."""
    pool_size: int = 256
    """Documents each lane chooses from when it packs a row."""
    remainders: Remainders = "keep"
    """What becomes of the rest of a document that is cut to fill a row: train on it later, or drop it."""

    eval_every: int = 250
    """Steps between validations; 0 validates at the end only."""
    eval_tokens: int = 10_485_760
    """Validation tokens, at most. The same rows every time, on any number of devices."""
    sample_every: int = 0
    """Steps between printed samples; 0 samples at the end only."""
    save_every: int = 250
    """Steps between checkpoints; 0 saves at the end only."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep, at least 2: the newest may turn out damaged."""
    log_every: int = 10
    """Steps between lines of metrics."""

    def __post_init__(self) -> None:
        """Refuse numbers that cannot be trained with, naming the flag to change."""
        _check_horizon(
            {
                "--num-steps": self.num_steps,
                "--target-flops": self.target_flops,
                "--target-epochs": self.target_epochs,
                "--data-param-ratio": self.data_param_ratio,
            }
        )
        _check_counts(self, "device_batch_size", "sequence_len", "lanes", "pool_size", "log_every", "eval_tokens")
        _check_counts(self, "aspect_ratio", "head_dim")
        _check_amounts(self, "embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr", "weight_decay")
        _check_amounts(self, "warmup_steps", "eval_every", "sample_every", "save_every", "stall_minutes")
        _check_amounts(self, "warmdown_ratio", "final_lr_fraction", most=1)
        _check_keep(self.keep_checkpoints)
        _check_seed(self.seed)

    @property
    def tag(self) -> str:
        """The model tag: given, or derived from the dial."""
        suffix = "" if self.variant == "modern" else f"-{self.variant}"
        return self.model_tag or f"d{self.depth}{suffix}"


@dataclass(frozen=True)
class TrainChatConfig:
    """Training on conversations, from a checkpoint of the stage before, whose model and learning rates it continues."""

    source: Literal["base", "mid"] = "base"
    """The stage to continue from."""
    tasks: tuple[str, ...] = ()
    """Conversations: NAME, NAME:xN for N times all of them, NAME:N for N of them, or jsonl=FILE for your own."""
    num_steps: int | None = None
    """Horizon: optimizer steps. Default: from the passes."""
    target_epochs: float | None = None
    """Horizon: passes over the conversations, 1 if no other is given."""
    total_batch_size: int | None = None
    """Tokens per optimizer step over all devices. Default: from --batch-fraction."""
    batch_fraction: float = 1.0
    """Tokens per optimizer step as a fraction of the base model's, rounded to a power of two of rows."""
    device_batch_size: int = 32
    """Rows per forward pass on one device. Lower it when memory runs out; the result stays the same."""
    lr_fraction: float = 1.0
    """Peak learning rates as a fraction of the base model's, before the square-root rule for another batch."""
    warmup_steps: int = 0
    """Steps of linear learning-rate warm-up, at most a tenth of the horizon."""
    warmdown_ratio: float = 0.5
    """Share of the horizon over which the learning rate falls to zero."""
    weight_decay: float = 0.0
    """Weight decay of the block matrices."""
    warm_start: bool = True
    """Continue with the optimizer's momentum and variance of the stage before."""

    seed: int = 42
    """Decides the order of the conversations."""
    lanes: int = 64
    """Independent streams of rows. The number of devices must divide it; the result does not depend on them."""
    pool_size: int = 256
    """Conversations each lane chooses from when it packs a row."""

    eval_every: int = 200
    """Steps between validations; 0 validates at the end only."""
    eval_tokens: int = 1_048_576
    """Validation tokens, at most. The same rows every time, on any number of devices."""
    sample_every: int = 0
    """Steps between printed samples; 0 samples at the end only."""
    save_every: int = 200
    """Steps between checkpoints; 0 saves at the end only."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep, at least 2: the newest may turn out damaged."""
    log_every: int = 10
    """Steps between lines of metrics."""

    def __post_init__(self) -> None:
        """Refuse numbers that cannot be trained with, naming the flag to change."""
        _check_horizon({"--num-steps": self.num_steps, "--target-epochs": self.target_epochs})
        _check_counts(self, "device_batch_size", "lanes", "pool_size", "log_every", "eval_tokens")
        _check_amounts(self, "lr_fraction", "batch_fraction", "weight_decay")
        _check_amounts(self, "warmup_steps", "eval_every", "sample_every", "save_every")
        _check_amounts(self, "warmdown_ratio", most=1)
        _check_keep(self.keep_checkpoints)
        _check_seed(self.seed)
        if not self.tasks:
            raise UsageError("there are no --tasks: nothing would be trained", "for example --tasks smoltalk gsm8k")
        for flag, value in {"--lr-fraction": self.lr_fraction, "--batch-fraction": self.batch_fraction}.items():
            if value <= 0:
                raise UsageError(f"{flag} is {value}: nothing would be learnt", f"give a positive {flag}")


# Mixtures, schedules and learning rates of both stages start from karpathy/nanochat: mid as of 2025-11 (SmolTalk, the
# auxiliary set of MMLU, GSM8K, spelling; constant rates, then a fifth of the horizon down to zero), SFT as of 2026-07
# (rates × 0.8, falling over the last half).
@dataclass(frozen=True)
class TrainMidConfig(TrainChatConfig):
    """Midtraining: the conversation format, tools and multiple choice, from many conversations."""

    tasks: tuple[str, ...] = ("smoltalk", "mmlu", "gsm8k", "identity:x2", "spelling")
    warmdown_ratio: float = 0.2


@dataclass(frozen=True)
class TrainSFTConfig(TrainChatConfig):
    """Supervised finetuning: fewer conversations, closer to what is to be asked."""

    tasks: tuple[str, ...] = ("smoltalk:10000", "arc-easy", "arc-challenge", "gsm8k", "identity:x2", "spelling:300")
    source: Literal["base", "mid"] = "mid"
    batch_fraction: float = 0.125
    lr_fraction: float = 0.8


@dataclass(frozen=True)
class EvalConfig:
    """What the models of a run are examined with."""

    tasks: tuple[str, ...] = ()
    """Names of tasks. Default: those of midtraining and SFT that have right answers."""
    max_problems: int | None = None
    """Of each task, at most this many problems, always the same ones. Default: all."""
    max_new_tokens: int = 256
    """Longest answer in free text."""
    batch_size: int = 16
    """Problems per forward pass on one device. Lower it when memory runs out; the result stays the same."""


@dataclass(frozen=True)
class RunConfig:
    """Everything about a run.

    Attributes:
        run: its name.
        data: `builtin`, `existing` (what is in base_data already), or a folder of text.
        tokenizer: how the tokenizer is trained.
        base: how the base model is trained, and how the machine is used, by all stages.
        mid: how it is midtrained.
        sft: how it is finetuned.
        evaluation: what the models are examined with.
        gpu_hour_price: what an hour of one GPU costs, for the report.
        workers: processes that tokenise; None for one per core.
        also_validate: folders of tokens that the base model is validated on as well, by name.
    """

    run: str
    data: str
    tokenizer: TokenizerConfig
    base: TrainBaseConfig
    mid: TrainMidConfig = field(default_factory=TrainMidConfig)
    sft: TrainSFTConfig = field(default_factory=TrainSFTConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    gpu_hour_price: float | None = None
    workers: int | None = None
    also_validate: Mapping[str, Path] = field(default_factory=dict)


def _check_horizon(horizons: dict[str, float | None]) -> None:
    given = {flag: value for flag, value in horizons.items() if value is not None}
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} each set the horizon", "give one of them")
    for flag, value in given.items():
        if not value > 0:
            raise UsageError(f"{flag} is {value}: such a run would train nothing", f"give a positive {flag}")
        if math.isinf(value):
            raise UsageError(f"{flag} is {value}: such a run would never end", f"give a finite {flag}")


def _check_counts(config: object, *names: str) -> None:
    for name in names:
        flag, count = f"--{name.replace('_', '-')}", getattr(config, name)
        if count < 1:
            raise UsageError(f"{flag} is {count}", f"give {flag} 1 or more")


def _check_amounts(config: object, *names: str, most: float = math.inf) -> None:
    """Refuse what is negative, not a number, infinite, or more than `most`."""
    for name in names:
        flag, amount = f"--{name.replace('_', '-')}", getattr(config, name)
        if not 0 <= amount <= most or math.isinf(amount):
            upto = "or more" if math.isinf(most) else f"to {most:g}"
            raise UsageError(f"{flag} is {amount}", f"give {flag} a number of 0 {upto}")


def _check_keep(keep_checkpoints: int) -> None:
    if keep_checkpoints < 2:
        raise UsageError(
            f"--keep-checkpoints is {keep_checkpoints}: if the newest is damaged nothing is left",
            "give --keep-checkpoints 2 or more",
        )


def _check_seed(seed: int) -> None:
    if not 0 <= seed <= LARGEST_SEED:
        raise UsageError(f"--seed is {seed}", f"give --seed a number from 0 to {LARGEST_SEED}")


# The demo trains in three minutes on two cores, so it is set for what a small model learns in few tokens: a small
# vocabulary, a short context, small batches. benchmarks/LOG.md says what else was tried.
DEMO_TOKENIZER = TokenizerConfig(vocab_size=4096)
DEMO_BASE = TrainBaseConfig(
    depth=4,
    head_dim=64,
    sequence_len=256,
    model_tag="demo",
    num_steps=240,
    total_batch_size=16 * 256,
    matrix_lr=0.03,
    embedding_lr=0.5,
    unembedding_lr=0.015,
    scale_hyperparameters=False,
    device_batch_size=16,
    lanes=8,
    eval_every=100,
    eval_tokens=65_536,
    save_every=50,
)
DEMO_MID = TrainMidConfig(
    tasks=("library", "library-kinds:x2", "arithmetic", "spelling", "identity:x4"),
    num_steps=100,
    lr_fraction=0.3,
    device_batch_size=16,
    lanes=8,
    eval_every=0,
    eval_tokens=65_536,
    save_every=50,
)
DEMO_SFT = TrainSFTConfig(
    tasks=("library:2000", "library-kinds", "arithmetic:1000", "spelling:1000", "identity:x4"),
    num_steps=60,
    batch_fraction=1.0,
    lr_fraction=0.2,
    device_batch_size=16,
    lanes=8,
    eval_every=0,
    eval_tokens=65_536,
    save_every=50,
)
DEMO_EVAL = EvalConfig(tasks=("library-kinds", "arithmetic", "spelling"), max_new_tokens=48)
DEMO_QUESTION = "What does `os.path.join` do?"

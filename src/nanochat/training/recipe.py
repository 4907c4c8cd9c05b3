"""From one dial and one horizon to batch size, learning rates and weight decay.

The reference is nanochat's d12, where the hyperparameters were tuned (dev/LOG.md, 2026-01 to 2026-03): 12 training
tokens per scaling parameter and 2¹⁹ tokens per step. Other runs are reached from there:

1. horizon D, in tokens: asked for, or data:parameter ratio × scaling parameters (Chinchilla, arXiv 2203.15556; block
   matrices + lm_head give the cleanest fit, LOG 2026-01-27);
2. batch B ∝ D^0.383 (Power Lines, arXiv 2505.13738), as a power of two;
3. learning rates ∝ √(B/B_ref) (square-root rule for Adam, arXiv 2205.10287; assumed for Muon), and ∝ 1/√width for
   embeddings and head;
4. weight decay ∝ √(B/B_ref) · D_ref/D, which keeps the averaging time B/(ηλD) constant (arXiv 2405.13698).

The fits do not reach to toys, so rules 3 and 4 stop at limits (see below). All of it is computed for the horizon that
is actually run, and none of it depends on how many devices there are. nanochat keeps the ratio-12 horizon in 2 and 4
even when another one is given, so that a 50-step test there trains with the batch of a full run.
"""

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from nanochat.config import ModelConfig, RunConfig, StageName, TrainBaseConfig, TrainChatConfig, model_from_depth
from nanochat.errors import UsageError
from nanochat.model.size import check_fp8_sizes, flops_per_token, parameter_counts

REFERENCE_DEPTH = 12
REFERENCE_RATIO = 12.0
REFERENCE_BATCH_TOKENS = 2**19
BATCH_EXPONENT = 0.383
# The rules were fitted between d8 and d26. A toy's horizon is a thousand times shorter, where rule 4 would ask for a
# decay that erases the weights, so its factor ends where the fits end (D_ref/D of a d4 at ratio 12).
LARGEST_DECAY_FACTOR = 16.0
# Likewise rule 3: at 2¹² tokens per step it would ask for 0.09 of the reference rates, where 0.5 to 1 of them learn
# fastest (benchmarks/LOG.md, 2026-11-22). So it is followed down to a quarter of the reference batch.
SMALLEST_LR_SCALE = 0.5


@dataclass(frozen=True)
class Recipe:
    """The numbers a run is trained with."""

    num_steps: int
    total_batch_size: int
    lr_scale: float
    weight_decay: float
    warmup_steps: int

    @property
    def total_tokens(self) -> int:
        """Training tokens over the whole horizon."""
        return self.num_steps * self.total_batch_size


def base_shape(config: TrainBaseConfig, vocab_size: int) -> ModelConfig:
    """The model that the settings ask for. Raises UsageError if they make none, or none that fp8 can train."""
    shape = model_from_depth(
        config.depth,
        vocab_size,
        config.sequence_len,
        aspect_ratio=config.aspect_ratio,
        head_dim=config.head_dim,
        num_kv_heads=config.num_kv_heads,
        window_pattern=config.window_pattern,
        variant=config.variant,
    )
    if config.fp8:
        check_fp8_sizes(shape)
    return shape


def reference_horizon(vocab_size: int, sequence_len: int) -> float:
    """Tokens of the reference run, a d12 with this tokenizer at 12 tokens per scaling parameter."""
    reference = model_from_depth(REFERENCE_DEPTH, vocab_size, sequence_len)
    return REFERENCE_RATIO * parameter_counts(reference)["scaling"]


def _round_batch(tokens: float, unit: int) -> int:
    """The power of two nearest to `tokens`, made a positive multiple of `unit`."""
    power = 2 ** round(math.log2(max(tokens, 1)))
    return int(max(1, round(power / unit)) * unit)


def make_recipe(config: TrainBaseConfig, model: ModelConfig, dataset_tokens: int) -> Recipe:
    """Resolve horizon, batch size, learning-rate scale and weight decay.

    Args:
        config: what the user asked for.
        model: the shape to be trained.
        dataset_tokens: tokens of one pass over the training data.

    Raises:
        UsageError: the batch is not a whole number of rows, or the horizon has no step in it.
    """
    unit = model.sequence_len
    ratio = config.data_param_ratio or REFERENCE_RATIO
    horizon = float(ratio * parameter_counts(model)["scaling"])
    if config.target_flops is not None:
        horizon = config.target_flops / flops_per_token(model)
    elif config.target_epochs is not None:
        horizon = config.target_epochs * dataset_tokens
    reference = reference_horizon(model.vocab_size, model.sequence_len)

    batch = config.total_batch_size
    if batch is None:
        if config.num_steps is None:
            batch = _round_batch(REFERENCE_BATCH_TOKENS * (horizon / reference) ** BATCH_EXPONENT, unit)
        else:
            # D = steps · B and B ∝ D^e, so B = B_ref · (steps · B_ref / D_ref)^(e / (1 − e)).
            growth = config.num_steps * REFERENCE_BATCH_TOKENS / reference
            batch = _round_batch(REFERENCE_BATCH_TOKENS * growth ** (BATCH_EXPONENT / (1 - BATCH_EXPONENT)), unit)
    if batch < 1 or batch % unit:
        raise UsageError(
            f"--total-batch-size {batch} is not a whole number of rows of {unit} tokens",
            f"for example --total-batch-size {max(1, round(batch / unit)) * unit}",
        )
    num_steps = config.num_steps if config.num_steps is not None else int(horizon // batch)
    if num_steps < 1:
        raise UsageError(
            f"a horizon of {horizon:,.0f} tokens holds no step of {batch:,} tokens: nothing would be trained",
            "give a longer horizon or a smaller --total-batch-size",
        )
    lr_scale, weight_decay = 1.0, config.weight_decay
    if config.scale_hyperparameters:
        lr_scale = max(math.sqrt(batch / REFERENCE_BATCH_TOKENS), SMALLEST_LR_SCALE)
        # B / (η λ D) as in the reference, whatever became of η: above the floor this is the √(B/B_ref) of rule 4.
        batch_factor = batch / REFERENCE_BATCH_TOKENS / lr_scale
        weight_decay *= batch_factor * min(reference / (num_steps * batch), LARGEST_DECAY_FACTOR)
    return Recipe(
        num_steps=num_steps,
        total_batch_size=batch,
        lr_scale=lr_scale,
        weight_decay=weight_decay,
        warmup_steps=min(config.warmup_steps, num_steps // 10),
    )


def chat_batch_size(config: TrainChatConfig, base_batch_size: int, sequence_len: int) -> int:
    """Tokens per step: as asked for, or a fraction of the base model's.

    Raises:
        UsageError: it is not a whole number of rows.
    """
    batch = config.total_batch_size
    if batch is None:
        rows = base_batch_size * config.batch_fraction / sequence_len
        batch = sequence_len * 2 ** max(0, round(math.log2(rows)))
    if batch < 1 or batch % sequence_len:
        raise UsageError(
            f"--total-batch-size {batch} is not a whole number of rows of {sequence_len} tokens",
            f"for example --total-batch-size {max(1, round(batch / sequence_len)) * sequence_len}",
        )
    return batch


def check_ranks(
    config: RunConfig, stages: Collection[StageName], recipe: Recipe, world_size: int
) -> Iterator[UsageError]:
    """Errors of the chosen stages whose rows and lanes cannot be shared evenly.

    Args:
        config: of the run.
        stages: those chosen.
        recipe: of its base model.
        world_size: how many ranks are to share.
    """
    unit = config.base.sequence_len
    shared = {
        "base": ("", recipe.total_batch_size, config.base.lanes),
        "mid": ("mid.", chat_batch_size(config.mid, recipe.total_batch_size, unit), config.mid.lanes),
        "sft": ("sft.", chat_batch_size(config.sft, recipe.total_batch_size, unit), config.sft.lanes),
    }
    for name, (prefix, batch, lanes) in shared.items():
        rows = batch // unit
        if name in stages and (rows % world_size or lanes % world_size):
            yield UsageError(
                f"{world_size} ranks cannot share the {rows} rows and {lanes} lanes of {name} evenly",
                f"for example --{prefix}total-batch-size {unit * world_size * -(-rows // world_size)} "
                f"--{prefix}lanes {world_size * -(-lanes // world_size)}; or use another number of devices",
            )

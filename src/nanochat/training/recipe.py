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
from dataclasses import dataclass

import torch

from nanochat.config import ModelConfig, TrainBaseConfig, model_from_depth
from nanochat.errors import UsageError
from nanochat.model.gpt import GPT, part_of
from nanochat.optim.optimizer import AdamWGroup, MuonGroup, ParameterGroup

REFERENCE_DEPTH = 12
REFERENCE_RATIO = 12.0
REFERENCE_BATCH_TOKENS = 2**19
REFERENCE_WIDTH = 768
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


def meta_model(config: ModelConfig) -> GPT:
    """A model without storage, to count parameters and FLOPs of any size on any machine."""
    with torch.device("meta"):
        return GPT(config)


def reference_horizon(vocab_size: int, sequence_len: int) -> float:
    """Tokens of the reference run, a d12 with this tokenizer at 12 tokens per scaling parameter."""
    reference = model_from_depth(REFERENCE_DEPTH, vocab_size, sequence_len)
    return REFERENCE_RATIO * meta_model(reference).parameter_counts()["scaling"]


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
    meta = meta_model(model)
    unit = model.sequence_len
    ratio = config.data_param_ratio or REFERENCE_RATIO
    horizon = float(ratio * meta.parameter_counts()["scaling"])
    if config.target_flops is not None:
        horizon = config.target_flops / meta.flops_per_token()
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


def parameter_groups(model: GPT, config: TrainBaseConfig, recipe: Recipe) -> list[ParameterGroup]:
    """Sort a model's parameters into optimizer groups: Muon for matrices, AdamW for the rest.

    Betas, decays and the factors between groups are nanochat's (gpt.py, 2026-07).
    """
    width_scale = (model.config.n_embd / REFERENCE_WIDTH) ** -0.5
    embedding_lr = config.embedding_lr * width_scale * recipe.lr_scale
    unembedding_lr = config.unembedding_lr * width_scale * recipe.lr_scale
    scalar_lr = config.scalar_lr * recipe.lr_scale

    named: dict[str, dict[str, torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        part = part_of(name)
        named.setdefault(name.split("_")[0] if part == "scalars" else part, {})[name] = parameter

    def adamw(part: str, lr: float, betas: tuple[float, float], weight_decay: float) -> AdamWGroup:
        return AdamWGroup(part, named[part], lr=lr, betas=betas, weight_decay=weight_decay)

    matrix_lr = config.matrix_lr * recipe.lr_scale
    groups: list[ParameterGroup] = [
        adamw("lm_head", unembedding_lr, (0.8, 0.96), 0.01),
        adamw("wte", embedding_lr, (0.8, 0.995), 0.001),
        MuonGroup("matrices", named["matrices"], lr=matrix_lr, weight_decay=recipe.weight_decay),
    ]
    if model.config.variant == "modern":
        groups += [
            adamw("value_embeds", embedding_lr / 2, (0.8, 0.995), 0.01),
            adamw("resid", scalar_lr / 100, (0.8, 0.95), 0.05),
            adamw("x0", scalar_lr, (0.96, 0.95), 0.0),
            adamw("smear", 0.2, (0.8, 0.95), 0.0),
            adamw("backout", 0.2, (0.8, 0.95), 0.0),
        ]
    return groups

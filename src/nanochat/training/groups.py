"""Which of a model's parameters are trained how: Muon for matrices, AdamW for the rest."""

import torch

from nanochat.config import TrainBaseConfig
from nanochat.model.gpt import GPT, part_of
from nanochat.optim.optimizer import AdamWGroup, MuonGroup, ParameterGroup
from nanochat.training.recipe import Recipe

REFERENCE_WIDTH = 768


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

"""Tiny models: one in which everything matters, and one that says what it is told to."""

import torch

from nanochat.config import ModelConfig, Variant
from nanochat.model.gpt import GPT

CONTEXT = 24


def random_model(variant: Variant = "modern", vocab_size: int = 101, window: int = CONTEXT, seed: int = 0) -> GPT:
    """Every weight random, attention as loud as the embeddings, grouped heads, a window on all layers but the last."""
    torch.manual_seed(seed)
    model = GPT(
        ModelConfig(
            vocab_size=vocab_size, sequence_len=CONTEXT, n_layer=3, n_head=4, n_kv_head=2, n_embd=32, variant=variant
        )
    )
    model.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        for block in model.blocks:
            block.attn.c_proj.weight.mul_(3)
    for block in model.blocks[:-1]:
        block.attn.window = window
    return model


def scripted_model(successors: dict[int, int], vocab_size: int, sequence_len: int = 64, **options: torch.dtype) -> GPT:
    """A model whose likeliest token after each token is the given one; at most 64 tokens have a successor."""
    shape = ModelConfig(vocab_size, sequence_len, n_layer=1, n_head=2, n_kv_head=2, n_embd=64, variant="classic")
    model = GPT(shape, **options)
    torch.manual_seed(0)
    model.init_weights()  # Every layer starts as the identity, and stays it.
    wte = model.get_parameter("transformer.wte.weight")
    with torch.no_grad():
        wte[:, : len(successors)] = 0
        model.lm_head.weight.zero_()
        for channel, (token, following) in enumerate(successors.items()):
            wte[token] = 0
            wte[token, channel] = 1
            model.lm_head.weight[following, channel] = 10
    return model

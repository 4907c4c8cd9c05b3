"""Sampling from a model by running it over the whole context again for each token.

Slow and plainly right: it is for the short samples of a training run and as the reference that a cached engine is
tested against.
"""

import torch

from nanochat.model.gpt import GPT


@torch.no_grad()
def generate(
    model: GPT,
    prompt: list[int],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
    stop: frozenset[int] = frozenset(),
) -> list[int]:
    """Continue a prompt of token ids.

    Args:
        prompt: at least one token, as a rule BOS first.
        max_new_tokens: how many to add at most; the context slides when it is full.
        temperature: 0 takes the likeliest token every time.
        top_k: sample only from the k likeliest.
        seed: with a temperature, decides the draw; no global random state is touched.
        stop: ids that end the text; the one that did is not returned.

    Returns:
        The new tokens only.
    """
    device = model.lm_head.weight.device
    generator = torch.Generator(device=device).manual_seed(seed)
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        context = torch.tensor([tokens[-model.config.sequence_len :]], device=device)
        logits_V = model(context)[0, -1]
        if temperature == 0:
            token = int(logits_V.argmax())
        else:
            if top_k is not None and top_k < logits_V.numel():
                threshold = logits_V.topk(top_k).values[-1]
                logits_V = logits_V.masked_fill(logits_V < threshold, float("-inf"))
            token = int(torch.multinomial(torch.softmax(logits_V / temperature, dim=-1), 1, generator=generator))
        if token in stop:
            break
        tokens.append(token)
    return tokens[len(prompt) :]

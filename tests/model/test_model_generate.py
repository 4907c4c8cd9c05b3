"""Sampling: greedy is greedy, a seed decides the draw, and a full context slides."""

import torch

from nanochat.config import ModelConfig
from nanochat.model.generate import generate
from nanochat.model.gpt import GPT


def random_model() -> GPT:
    torch.manual_seed(1)
    model = GPT(ModelConfig(vocab_size=40, sequence_len=10, n_layer=2, n_head=2, n_kv_head=2, n_embd=32))
    model.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def test_greedy_takes_the_likeliest_token_each_time_even_when_the_context_is_full() -> None:
    model = random_model()
    tokens = [3, 1]
    for new in generate(model, tokens, 15):
        assert new == int(model(torch.tensor([tokens[-10:]]))[0, -1].argmax())
        tokens.append(new)
    assert len(tokens) == 17


def test_the_seed_decides_and_the_global_generator_is_left_alone() -> None:
    model = random_model()
    state = torch.get_rng_state()
    drawn = [generate(model, [3], 12, temperature=1.0, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_top_1_is_greedy_at_any_temperature() -> None:
    model = random_model()
    assert generate(model, [3], 12, temperature=2.0, top_k=1) == generate(model, [3], 12)


def test_a_stop_token_ends_the_text_and_is_not_part_of_it() -> None:
    model = random_model()
    whole = generate(model, [3], 12)
    stop = whole[4]
    assert generate(model, [3], 12, stop=frozenset({stop})) == whole[: whole.index(stop)]

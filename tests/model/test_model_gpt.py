"""The network: its shape, its start, and that no position sees the future."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from nanochat.config import ModelConfig, Variant
from nanochat.model.gpt import GPT
from toolchain import needs_compiler

SMALL = ModelConfig(vocab_size=101, sequence_len=24, n_layer=3, n_head=4, n_kv_head=2, n_embd=32)


def small_model(variant: Variant = "modern", seed: int = 0, **changes: int) -> GPT:
    """A tiny model with every weight random, so that no part is silent as it is at the start of training."""
    torch.manual_seed(seed)
    model = GPT(replace(SMALL, variant=variant, **changes))  # type: ignore[arg-type]
    model.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.mark.parametrize("variant", ["modern", "classic"])
def test_the_first_loss_is_that_of_a_uniform_guess(variant: Variant) -> None:
    model = GPT(replace(SMALL, variant=variant))
    torch.manual_seed(0)
    model.init_weights()
    tokens = torch.randint(0, 101, (4, 25))
    loss = model(tokens[:, :-1], tokens[:, 1:])
    assert_close(loss.item() / (4 * 24), torch.tensor(101.0).log().item(), atol=0.01, rtol=0)


@pytest.mark.parametrize("variant", ["modern", "classic"])
def test_no_position_sees_the_future(variant: Variant) -> None:
    model = small_model(variant)
    tokens = torch.randint(0, 101, (1, 24))
    changed = tokens.clone()
    changed[0, 13] = (changed[0, 13] + 1) % 101
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :13], after[:, :13])
    assert not torch.equal(before[:, 13], after[:, 13])


def test_the_variants_differ_only_by_the_modern_parts() -> None:
    modern, classic = small_model("modern"), small_model("classic")
    extra = set(modern.state_dict()) - set(classic.state_dict())
    assert set(classic.state_dict()) <= set(modern.state_dict())
    assert all(
        name.startswith(("value_embeds", "resid", "x0", "smear", "backout")) or "ve_gate" in name for name in extra
    )


def test_a_modern_model_with_its_parts_made_neutral_is_the_classic_one() -> None:
    """Each modern part can be switched off by its weights: what is left must be the classic arithmetic."""
    modern, classic = small_model("modern"), small_model("classic")
    with torch.no_grad():
        modern.resid_lambdas.fill_(1)
        modern.x0_lambdas.fill_(0)
        modern.smear_lambda.fill_(0)
        modern.backout_lambda.fill_(0)
        for embedding in modern.value_embeds.values():
            embedding.get_parameter("weight").fill_(0)
    for block in modern.blocks:
        block.attn.qk_scale = 1.0
        block.attn.window = SMALL.sequence_len
    classic.load_state_dict({name: modern.state_dict()[name] for name in classic.state_dict()})
    tokens = torch.randint(0, 101, (2, 24))
    assert_close(modern(tokens), classic(tokens))


@pytest.mark.parametrize("part", ["resid_lambdas", "x0_lambdas", "smear_lambda", "backout_lambda", "value_embeds"])
def test_every_modern_part_takes_part(part: str) -> None:
    model = small_model()
    tokens = torch.randint(0, 101, (2, 24))
    before = model(tokens)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(part):
                parameter.add_(0.5)
    assert not torch.allclose(before, model(tokens))


def test_every_weight_gets_a_gradient() -> None:
    model = small_model()
    tokens = torch.randint(0, 101, (4, 25))
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


def test_logits_stay_within_the_cap() -> None:
    model = small_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(1000)
    assert model(torch.randint(0, 101, (2, 24))).abs().max() <= 15


def test_token_losses_add_up_to_the_training_loss() -> None:
    model = small_model()
    tokens = torch.randint(0, 101, (4, 25))
    targets = tokens[:, 1:].clone()
    targets[:2, :7] = -1
    losses = model.token_losses(tokens[:, :-1], targets)
    assert (losses[:2, :7] == 0).all()
    assert_close(losses.sum(), model(tokens[:, :-1], targets))


def test_bfloat16_computes_nearly_the_same_and_keeps_float32_weights() -> None:
    model = small_model()
    half = GPT(model.config, torch.bfloat16)
    half.load_state_dict(model.state_dict())
    tokens = torch.randint(0, 101, (4, 25))
    assert_close(model(tokens[:, :-1], tokens[:, 1:]), half(tokens[:, :-1], tokens[:, 1:]), rtol=0.03, atol=0.03)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float32}


@needs_compiler
def test_compiled_and_eager_agree() -> None:
    model = small_model()
    compiled = torch.compile(model, dynamic=False)
    tokens = torch.randint(0, 101, (2, 25))
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    gradients = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    model.zero_grad()
    loss = compiled(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    assert_close(loss, model(tokens[:, :-1], tokens[:, 1:]), rtol=1e-4, atol=1e-4)
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-4)

"""The classic variant is, weight for weight, the architecture that transformers knows as NanoChatForCausalLM."""

import pytest
import torch
from torch.testing import assert_close
from transformers import NanoChatConfig, NanoChatForCausalLM

from nanochat.config import ModelConfig
from nanochat.export.huggingface import huggingface_config, huggingface_weights
from nanochat.model.gpt import GPT


@pytest.mark.parametrize("n_kv_head", [4, 2])
def test_classic_logits_are_those_of_transformers(n_kv_head: int) -> None:
    shape = ModelConfig(
        vocab_size=131, sequence_len=48, n_layer=3, n_head=4, n_kv_head=n_kv_head, n_embd=64, variant="classic"
    )
    torch.manual_seed(0)
    ours = GPT(shape)
    ours.init_weights()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs = NanoChatForCausalLM(NanoChatConfig(**huggingface_config(shape))).eval()
    theirs.load_state_dict(huggingface_weights(ours), strict=True)
    tokens = torch.randint(0, shape.vocab_size, (2, 48))
    with torch.no_grad():
        assert_close(ours(tokens), theirs(tokens).logits, atol=1e-5, rtol=0)

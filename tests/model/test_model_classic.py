"""The classic variant is, weight for weight, the architecture that transformers knows as NanoChatForCausalLM."""

import pytest
import torch
from torch.testing import assert_close
from transformers import NanoChatConfig, NanoChatForCausalLM

from nanochat.config import ModelConfig
from nanochat.model.gpt import GPT, NORM_EPSILON, ROPE_THETA
from nanochat.model.loss import LOGIT_CAP

OURS_TO_THEIRS = {
    "transformer.wte": "model.embed_tokens",
    "transformer.h.": "model.layers.",
    "attn.c_q": "self_attn.q_proj",
    "attn.c_k": "self_attn.k_proj",
    "attn.c_v": "self_attn.v_proj",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


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
    theirs = NanoChatForCausalLM(
        NanoChatConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.n_embd,
            intermediate_size=4 * shape.n_embd,
            num_hidden_layers=shape.n_layer,
            num_attention_heads=shape.n_head,
            num_key_value_heads=shape.n_kv_head,
            max_position_embeddings=shape.sequence_len,
            rms_norm_eps=NORM_EPSILON,
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
            final_logit_softcapping=LOGIT_CAP,
        )
    ).eval()
    weights = {}
    for name, weight in ours.state_dict().items():
        for our_part, their_part in OURS_TO_THEIRS.items():
            name = name.replace(our_part, their_part)
        weights[name] = weight
    theirs.load_state_dict(weights, strict=True)
    tokens = torch.randint(0, shape.vocab_size, (2, 48))
    with torch.no_grad():
        assert_close(ours(tokens), theirs(tokens).logits, atol=1e-5, rtol=0)

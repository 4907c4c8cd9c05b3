"""The network for generation is the one that was trained, in every dtype, and only cheaper."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from models import random_model
from nanochat.config import Variant
from nanochat.model.gpt import GPT
from nanochat.model.inference import InferenceModel, Matmul
from nanochat.model.kv_cache import Token
from nanochat.model.loss import softcap

VARIANTS: tuple[Variant, ...] = ("modern", "classic")
TEXT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]


def logits_along(network: InferenceModel, text: list[int]) -> Tensor:
    """After each token but the first, which is the prompt, twice at once."""
    cache = network.new_cache(2)
    found = [network.next_logits(cache.append([text[:1], text[:1]]))]
    for token in text[1:]:
        tokens = torch.full((2, 1), token, device=network.device)
        found.append(network.next_logits(Token(cache, tokens)))
        cache.lengths = [length + 1 for length in cache.lengths]
    return softcap(torch.stack(found, dim=1))


@pytest.mark.parametrize("variant", VARIANTS)
def test_in_bfloat16_it_is_as_close_to_float32_as_the_model_itself(variant: Variant) -> None:
    model = random_model(variant, window=5)
    exact = model(torch.tensor([TEXT, TEXT])).detach()
    model.compute_dtype = torch.bfloat16
    rounded = model(torch.tensor([TEXT, TEXT])).detach()
    found = logits_along(InferenceModel(model), TEXT)
    assert (found - exact).norm() <= 1.5 * (rounded - exact).norm()


def test_it_is_made_once_and_the_model_is_left_alone() -> None:
    model = random_model()
    model.compute_dtype = torch.bfloat16
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    network = InferenceModel(model)
    logits_along(network, TEXT)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])
    assert network.wte.dtype == network.lm_head.weight.dtype == torch.bfloat16
    matrices = sum(weight.numel() for name, weight in before.items() if "wte" not in name and weight.ndim == 2)
    embeddings = sum(weight.numel() for name, weight in before.items() if "value_embeds" in name)
    # Two bytes each; gates are filled up to whole rows.
    assert 2 * (matrices - embeddings) <= network.bytes_per_step <= 2.2 * (matrices - embeddings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(24, 40), (1032, 1024)])
def test_a_weight_in_the_layout_of_the_machine_is_the_same_weight(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    for rows in ((1, 1), (7, 1), (2, 65)):
        x = torch.randn(*rows, shape[1], generator=generator).to(dtype)
        exact = x.double() @ weight.to(dtype).double().t()
        assert_close(
            Matmul(weight, dtype)(x).double(), exact, atol=1e-1 if dtype == torch.bfloat16 else 1e-3, rtol=1e-2
        )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_it_is_the_same_network(variant: Variant, dtype: torch.dtype) -> None:
    model = random_model(variant, window=5)
    expected = logits_along(InferenceModel(model), TEXT)
    on_gpu = GPT(replace(model.config), dtype)
    on_gpu.load_state_dict(model.state_dict())
    for block in on_gpu.blocks[:-1]:
        block.attn.window = 5
    tolerance = 1e-2 if dtype == torch.float32 else 0.5
    assert_close(logits_along(InferenceModel(on_gpu.cuda()), TEXT).cpu(), expected, atol=tolerance, rtol=0.05)

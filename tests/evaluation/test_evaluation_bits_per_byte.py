"""Bits per byte: against its definition, and the same for any batch and number of ranks."""

import math
import os

import numpy as np
import pytest
import torch

from distributed import run_distributed
from nanochat.config import ModelConfig
from nanochat.errors import DataError
from nanochat.evaluation.bits_per_byte import bits_per_byte, unigram_bits_per_byte
from nanochat.model.gpt import GPT
from nanochat.runtime import Runtime

VOCAB = 50
CPU = Runtime(torch.device("cpu"), torch.float32)


def example() -> tuple[GPT, np.ndarray, np.ndarray]:
    """A model with random weights, eleven rows of tokens, and bytes per token with two special tokens."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(vocab_size=VOCAB, sequence_len=12, n_layer=2, n_head=2, n_kv_head=2, n_embd=32))
    model.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    random = np.random.default_rng(0)
    rows = random.integers(0, VOCAB, (11, 13)).astype(np.int32)
    token_bytes = random.integers(1, 9, VOCAB)
    token_bytes[-2:] = 0
    return model, rows, token_bytes


@pytest.mark.parametrize("share_trained", [1.0, 0.5, 0.1])
def test_it_is_the_nats_of_all_trained_text_tokens_over_their_bytes(share_trained: float) -> None:
    model, rows, token_bytes = example()
    trained = np.random.default_rng(1).random(rows.shape) < share_trained
    nats, num_bytes = 0.0, 0
    for row, said in zip(rows.astype(np.int64), trained, strict=True):
        log_probabilities = torch.log_softmax(model(torch.from_numpy(row[None, :-1])), dim=-1)[0]
        for position, target in enumerate(row[1:]):
            if token_bytes[target] > 0 and said[position + 1]:
                nats -= log_probabilities[position, target].item()
                num_bytes += int(token_bytes[target])
    packed = np.where(trained, rows, ~rows)
    assert bits_per_byte(model, packed, token_bytes, CPU, 4) == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)


def test_padding_at_the_end_of_rows_changes_nothing() -> None:
    model, rows, token_bytes = example()
    padded = np.concatenate([rows[:, :8], np.full((11, 5), ~(VOCAB - 1), np.int32)], axis=1)
    assert bits_per_byte(model, padded, token_bytes, CPU, 4) == pytest.approx(
        bits_per_byte(model, rows[:, :8], token_bytes, CPU, 4), rel=1e-6
    )


@pytest.mark.parametrize("batch", [1, 2, 5, 11, 64])
def test_it_does_not_depend_on_the_batch(batch: int) -> None:
    model, rows, token_bytes = example()
    assert bits_per_byte(model, rows, token_bytes, CPU, batch) == pytest.approx(
        bits_per_byte(model, rows, token_bytes, CPU, 3), rel=1e-6
    )


def on_a_rank() -> float:
    runtime = Runtime(CPU.device, CPU.compute_dtype, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    return bits_per_byte(*example(), runtime, 2)


@pytest.mark.parametrize("world_size", [2, 3])
def test_it_does_not_depend_on_the_number_of_ranks(world_size: int) -> None:
    alone = bits_per_byte(*example(), CPU, 2)
    assert run_distributed(on_a_rank, world_size) == pytest.approx([alone] * world_size, rel=1e-6)


def test_rows_without_text_are_refused() -> None:
    model, rows, token_bytes = example()
    with pytest.raises(DataError, match="hold no text"):
        bits_per_byte(model, rows, np.zeros_like(token_bytes), CPU, 4)
    with pytest.raises(DataError, match="hold no text"):
        bits_per_byte(model, ~rows, token_bytes, CPU, 4)


def test_the_unigram_baseline_is_the_entropy_of_the_bytes() -> None:
    assert unigram_bits_per_byte(b"abcd" * 100) == pytest.approx(2)
    assert unigram_bits_per_byte(b"aaab") == pytest.approx(0.75 * math.log2(4 / 3) + 0.25 * 2)
    assert unigram_bits_per_byte(b"aaaa") == 0

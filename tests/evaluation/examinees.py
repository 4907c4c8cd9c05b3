"""Models small enough to examine in milliseconds, with random weights or weights that say what one wants to hear."""

import os
from collections.abc import Sequence

import torch

from models import scripted_model
from nanochat.checkpoint.trained_model import TrainedModel
from nanochat.config import ModelConfig, Variant
from nanochat.corpus.conversation import Conversation, assistant, user
from nanochat.model.gpt import GPT
from nanochat.runtime import Runtime
from nanochat.tasks.task import Problem
from nanochat.tokenizer.tokenizer import Tokenizer

CPU = Runtime(torch.device("cpu"), torch.float32)


def rank_runtime() -> Runtime:
    """Where a rank started by `run_distributed` computes."""
    return Runtime(CPU.device, CPU.compute_dtype, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))


def byte_tokenizer() -> Tokenizer:
    """A token per byte: every text has one encoding, and any tokens of letters are one of a text."""
    return Tokenizer([bytes([value]) for value in range(256)], r"\s?\S+|\s+", digit_group=1)


def random_model(tokenizer: Tokenizer, sequence_len: int = 160, variant: Variant = "modern") -> GPT:
    """A model in which every weight matters and no answer is likelier than another by design."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(tokenizer.vocab_size, sequence_len, 2, 2, 1, 32, variant=variant))
    model.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def saying(tokenizer: Tokenizer, says: Sequence[str], sequence_len: int = 160) -> GPT:
    """A model that answers everything with the same tokens, given as text or special tokens, none of them twice."""
    special = tokenizer.special_ids
    ids = [token for word in says for token in ([special[word]] if word in special else tokenizer.encode(word))]
    successors = zip([special["<|assistant_start|>"], *ids], [*ids, special["<|assistant_end|>"]], strict=True)
    return scripted_model(dict(successors), tokenizer.vocab_size, sequence_len)


def as_trained(model: GPT, tokenizer: Tokenizer, **config: object) -> TrainedModel:
    """A model as if it came from a checkpoint."""
    return TrainedModel(model.eval(), tokenizer, "sft", "tiny", 3, dict(config), "0123456789abcdef")


def question(text: str, answer: str, choices: Sequence[str] = ()) -> Problem:
    """A problem of one question."""
    return Problem(Conversation((user(text), assistant(answer))), tuple(choices))

"""Generation with a cache: many prompts at once or one as a stream, with the calculator at hand.

Rows of a batch are of different lengths and know nothing of each other. In every pass each row hands in the tokens that
the cache has not seen — a part of its prompt, the token it has just drawn, or what the calculator answered — and a row
that has handed in all of them draws its next one. Rows that end leave the batch.

So an answer depends neither on the batch nor on how the prompt was cut: up to rounding, the likeliest tokens are those
of `nanochat.model.generate`.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random

import torch
from torch import Tensor

from nanochat.chat.calculator import calculate
from nanochat.errors import UsageError
from nanochat.model.gpt import GPT
from nanochat.model.kv_cache import KVCache
from nanochat.tokenizer.tokenizer import Tokenizer

STOP_TOKENS = ("<|assistant_end|>", "<|bos|>")
PREFILL_CHUNK = 512
BATCH_SIZE = 32


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: the longest answer, in tokens, what the calculator says included.
        temperature: 0 takes the likeliest token every time.
        top_k: draw only from the k likeliest.
        seed: with a temperature, decides the draw, together with the place of the prompt in the list.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what is not a way to choose a token."""
        if self.max_new_tokens < 1:
            raise UsageError(f"an answer of {self.max_new_tokens} tokens is none", "--max-new-tokens 1 or more")
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"a temperature of {self.temperature} is not one", "--temperature 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"there is no choice among {self.top_k} tokens", "--top-k 1 or more")


@dataclass
class _Row:
    """One text under way.

    Attributes:
        index: the place of its prompt in the caller's list.
        pending: tokens that the cache has not seen.
        room: how many new tokens it may still get.
        random: decides its draws.
        expression: what the model has said since it began to call the calculator; None while it does not.
    """

    index: int
    pending: list[int]
    room: int
    random: Random
    expression: list[int] | None = field(default=None)


class Engine:
    """Generates from a model.

    Where the compute dtype is not float32 it keeps a copy of the weights in that dtype, cast once and not at every
    token; make a new engine after training on.

    Args:
        model: the network; it is not changed.
        tokenizer: the one it was trained with.
        calculator: whether calls of the python tool are answered. What the calculator refuses gets no answer, and the
            model goes on by itself.
        prefill_chunk: at most so many tokens of a prompt are computed at once.
    """

    def __init__(
        self, model: GPT, tokenizer: Tokenizer, *, calculator: bool = True, prefill_chunk: int = PREFILL_CHUNK
    ) -> None:
        same_dtype = model.compute_dtype == model.lm_head.weight.dtype
        self.model = model if same_dtype else copy.deepcopy(model).requires_grad_(False).to(model.compute_dtype)
        self.tokenizer = tokenizer
        self.calculator = calculator
        self.prefill_chunk = prefill_chunk
        self._stop = frozenset(map(tokenizer.special_id, STOP_TOKENS))

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, batch_size: int = BATCH_SIZE
    ) -> list[list[int]]:
        """Continue each prompt until it stops, has `max_new_tokens` more, or fills the context.

        Args:
            prompts: token ids; none empty, none longer than the context.
            sampling: how tokens are chosen.
            batch_size: prompts computed at once. It changes time and memory, not the result.

        Returns:
            The new tokens of each prompt, tool calls and their output among them, without the one that stopped it.
        """
        answers: list[list[int]] = [[] for _ in prompts]
        # Alike in length, a batch has the least padding and its rows end together.
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        for start in range(0, len(order), batch_size):
            rows = [self._row(index, prompts[index], sampling) for index in order[start : start + batch_size]]
            for index, token in self._run(rows, sampling):
                answers[index].append(token)
        return answers

    def stream(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[int]:
        """Continue one prompt, handing out each token as soon as it is there: what `generate([prompt])` returns."""
        for _, token in self._run([self._row(0, prompt, sampling)], sampling):
            yield token

    def _row(self, index: int, prompt: Sequence[int], sampling: Sampling) -> _Row:
        room = self.model.config.sequence_len - len(prompt)
        if not prompt or room < 0:
            raise ValueError(f"a prompt of {len(prompt)} tokens, the context is {self.model.config.sequence_len}")
        # Text seeds go through SHA-512, so that neighbouring seeds and rows have nothing in common.
        return _Row(index, [*prompt], min(room, sampling.max_new_tokens), Random(f"{sampling.seed}:{index}"))

    def _run(self, rows: list[_Row], sampling: Sampling) -> Iterator[tuple[int, int]]:
        """Run a batch to its end, handing out (index of the prompt, new token)."""
        rows = [row for row in rows if row.room]
        if not rows:
            return
        cache = KVCache(
            self.model.config,
            len(rows),
            max(len(row.pending) + row.room for row in rows),
            device=self.model.lm_head.weight.device,
            dtype=self.model.compute_dtype,
        )
        while True:
            logits_BV = self.model.next_logits(cache.append([row.pending[: self.prefill_chunk] for row in rows]))
            for row in rows:
                del row.pending[: self.prefill_chunk]
            ready = [place for place, row in enumerate(rows) if not row.pending]
            if ready:
                drawn = choose_tokens(logits_BV[ready], sampling, [rows[place].random for place in ready])
                for place, token in zip(ready, drawn, strict=True):
                    for new in self._accept(rows[place], token):
                        yield rows[place].index, new
            alive = [place for place, row in enumerate(rows) if row.room]
            if not alive:
                return
            if len(alive) < len(rows):
                cache.select(alive)
                rows = [rows[place] for place in alive]

    def _accept(self, row: _Row, token: int) -> list[int]:
        """Take a drawn token into a row: the tokens it gets, which are more than one where the calculator answers.

        A row that ends has no room after it.
        """
        if token in self._stop:
            row.room = 0
            return []
        row.pending = [token, *self._tool_output(row, token)][: row.room]
        row.room -= len(row.pending)
        return row.pending

    def _tool_output(self, row: _Row, token: int) -> list[int]:
        """What the calculator says to a row, if this token ends a call that it can answer."""
        special, expression = self.tokenizer.special_ids, row.expression
        if token == special["<|python_start|>"]:
            row.expression = []
        elif token == special["<|python_end|>"]:
            row.expression = None
        elif expression is not None:
            expression.append(token)
        if not self.calculator or expression is None or token != special["<|python_end|>"]:
            return []
        result = calculate(self.tokenizer.decode(expression))
        if result is None:
            return []
        return [special["<|output_start|>"], *self.tokenizer.encode(result), special["<|output_end|>"]]


def choose_tokens(logits_BV: Tensor, sampling: Sampling, randoms: Sequence[Random]) -> list[int]:
    """Choose a token for each row, each by one number of its own source of randomness."""
    if sampling.temperature == 0:
        greedy: list[int] = logits_BV.argmax(dim=-1).tolist()
        return greedy
    if sampling.top_k is not None and sampling.top_k < logits_BV.size(1):
        threshold_B1 = logits_BV.topk(sampling.top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < threshold_B1, float("-inf"))
    # Where the running sum of probabilities passes the number drawn; in float64, as sums over a vocabulary round.
    sums_BV = torch.softmax(logits_BV.double() / sampling.temperature, dim=-1).cumsum(dim=-1)
    drawn_B1 = torch.tensor([[random.random()] for random in randoms], dtype=torch.float64, device=logits_BV.device)
    tokens: list[int] = torch.searchsorted(sums_BV, drawn_B1 * sums_BV[:, -1:], right=True).squeeze(1).tolist()
    return tokens

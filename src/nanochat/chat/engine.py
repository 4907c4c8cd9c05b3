"""Generation with a cache: many prompts at once or one as a stream, with the calculator at hand.

Rows of a batch are of different lengths and know nothing of each other. First their prompts are computed, in chunks,
and what they have in common only once. Then every row draws a token per step, until it ends. What the calculator
answers is fed to its row in place of what it draws, while the others go on.

On a CPU rows that end leave the batch. On a GPU, where a row more or less takes the same time, they stay, and the next
step is queued before the host has looked at the tokens of this one.

So an answer depends neither on the batch nor on how the prompt was cut: up to rounding, the likeliest tokens are those
of `nanochat.model.generate`.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from random import Random

import torch
from torch import Tensor

from nanochat.chat.calculator import calculate
from nanochat.chat.decoding import Decoding
from nanochat.errors import UsageError
from nanochat.model.gpt import GPT
from nanochat.model.inference import InferenceModel
from nanochat.model.kv_cache import KVCache
from nanochat.model.loss import softcap
from nanochat.tokenizer.tokenizer import Tokenizer

STOP_TOKENS = ("<|assistant_end|>", "<|bos|>")
PREFILL_CHUNK = 512
BATCH_SIZE = 32
# A shorter beginning that all prompts of a batch share is computed for each of them.
SHARED_TOKENS = 32


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
        text: the prompt and what has followed.
        room: how many new tokens it may still get.
        numbers: what decides its draws; none where nothing is left to chance.
        expression: what the model has said since it began to call the calculator; None while it does not.
        instead: tokens that are fed in place of the next ones it draws.
        in_vain: how many of the tokens that it draws next do not count.
    """

    index: int
    text: list[int]
    room: int
    numbers: list[float]
    expression: list[int] | None = None
    instead: deque[int] = field(default_factory=deque)
    in_vain: int = 0


class Engine:
    """Generates from a model, with weights of its own: make a new engine after training on.

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
        self.network = InferenceModel(model)
        self.config = model.config
        self.tokenizer = tokenizer
        self.calculator = calculator
        self.prefill_chunk = prefill_chunk
        self.runs_ahead = self.network.device.type == "cuda"
        self._stop = frozenset(map(tokenizer.special_id, STOP_TOKENS))
        # What the last stream has left: the text that the next one continues, as a rule.
        self._kept: tuple[KVCache, list[int]] | None = None

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
            rows = [row for row in rows if row.room]
            if rows:
                cache, logits_BV = self._read_prompts([row.text for row in rows], max(map(_end, rows)))
                for index, token in self._continue(rows, cache, logits_BV, sampling):
                    answers[index].append(token)
        return answers

    def stream(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[int]:
        """Continue one prompt, handing out each token as soon as it is there: what `generate([prompt])` returns.

        What the prompt has in common with the text of the stream before, such as the turns of a conversation, is not
        computed again. The cache for it takes the whole context.
        """
        row = self._row(0, prompt, sampling)
        if not row.room:
            return
        # Taken, so that another stream at the same time makes its own.
        kept, self._kept = self._kept, None
        cache, text = kept or (self.network.new_cache(1), [])
        common = min(_common_prefix(text[: cache.lengths[0]], row.text), len(row.text) - 1)
        common = common if cache.can_return_to(common) else 0
        cache.return_to(row.text[:common])
        try:
            logits_BV = self._append(cache, [row.text[common:]])
            for _, token in self._continue([row], cache, logits_BV, sampling):
                yield token
        finally:
            self._kept = (cache, row.text)

    def forget(self) -> None:
        """Free what is kept for the next stream."""
        self._kept = None

    def _row(self, index: int, prompt: Sequence[int], sampling: Sampling) -> _Row:
        room = self.config.sequence_len - len(prompt)
        if not prompt or room < 0:
            raise ValueError(f"a prompt of {len(prompt)} tokens, the context is {self.config.sequence_len}")
        room = min(room, sampling.max_new_tokens)
        # Text seeds go through SHA-512, so that neighbouring seeds and rows have nothing in common.
        random = Random(f"{sampling.seed}:{index}")
        return _Row(index, [*prompt], room, [random.random() for _ in range(room if sampling.temperature else 0)])

    def _read_prompts(self, prompts: Sequence[list[int]], capacity: int) -> tuple[KVCache, Tensor]:
        """Compute prompts, together: a cache that holds them, and the logits (B, V) after them."""
        shared = min(len(_shared_beginning(prompts)), min(map(len, prompts)) - 1)
        if len(prompts) == 1 or shared < SHARED_TOKENS:
            shared = 0
        cache = self.network.new_cache(1 if shared else len(prompts), capacity)
        if shared:
            self._append(cache, [prompts[0][:shared]])
            cache.select([0] * len(prompts))
        return cache, self._append(cache, [prompt[shared:] for prompt in prompts])

    def _append(self, cache: KVCache, rows: Sequence[list[int]]) -> Tensor:
        """Compute new tokens of each row, of all at least one, in chunks: the logits (B, V) after them."""
        last: dict[int, Tensor] = {}
        for start in range(0, max(map(len, rows)), self.prefill_chunk):
            chunk = [tokens[start : start + self.prefill_chunk] for tokens in rows]
            logits_BV = self.network.next_logits(cache.append(chunk))
            last |= {place: logits_BV[place] for place, tokens in enumerate(chunk) if tokens}
        return torch.stack([last[place] for place in range(len(rows))])

    def _continue(
        self, rows: list[_Row], cache: KVCache, logits_BV: Tensor, sampling: Sampling
    ) -> Iterator[tuple[int, int]]:
        """Run a batch to its end, handing out (index of the prompt, new token)."""
        numbers_BN = None
        if sampling.temperature:
            # Of what is beyond a row's room nothing is drawn that counts.
            most = max(len(row.numbers) for row in rows)
            numbers = [row.numbers + [0.0] * (most - len(row.numbers)) for row in rows]
            numbers_BN = torch.tensor(numbers, dtype=torch.float64, device=logits_BV.device)
        decoding = Decoding(self.network, cache, logits_BV, partial(choose_tokens, sampling), numbers_BN)
        while True:
            instead = [row.instead.popleft() if row.instead else None for row in rows]
            if self.runs_ahead:
                decoding.step(instead)
            for row, token in zip(rows, decoding.read(), strict=True):
                if row.in_vain:
                    row.in_vain -= 1
                elif row.room:
                    for new in self._accept(row, token):
                        yield row.index, new
            alive = [place for place, row in enumerate(rows) if row.room]
            if not alive:
                return
            if not self.runs_ahead:
                if len(alive) < len(rows):
                    decoding.select(alive)
                    rows, instead = [rows[place] for place in alive], [instead[place] for place in alive]
                decoding.step(instead)

    def _accept(self, row: _Row, token: int) -> list[int]:
        """Take a drawn token into a row: the tokens it gets, which are more than one where the calculator answers.

        A row that ends has no room after it.
        """
        if token in self._stop:
            row.room = 0
            return []
        output = self._tool_output(row, token)
        row.instead.extend(output)
        row.in_vain = len(output)
        new = [token, *output][: row.room]
        row.text += new
        row.room -= len(new)
        return new

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


def choose_tokens(sampling: Sampling, logits_BV: Tensor, numbers_B: Tensor | None) -> Tensor:
    """Choose a token for each row, on the device.

    Args:
        sampling: how.
        logits_BV: without the cap, which changes no order.
        numbers_B: float64 in [0, 1), what decides the draw of each row; without a temperature none are needed.
    """
    if sampling.temperature == 0 or numbers_B is None:
        # Four times as fast on a CPU as in bfloat16.
        return logits_BV.float().argmax(dim=-1)
    logits_BV = softcap(logits_BV)
    if sampling.top_k is not None and sampling.top_k < logits_BV.size(1):
        threshold_B1 = logits_BV.topk(sampling.top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < threshold_B1, float("-inf"))
    # Where the running sum of probabilities passes the number drawn; in float64, as sums over a vocabulary round.
    # Less the largest, so that the smallest temperature makes no infinities of both signs.
    logits_BV = logits_BV.double() - logits_BV.amax(dim=-1, keepdim=True)
    sums_BV = torch.softmax(logits_BV / sampling.temperature, dim=-1).cumsum(dim=-1)
    return torch.searchsorted(sums_BV, numbers_B[:, None] * sums_BV[:, -1:], right=True).squeeze(1)


def _end(row: _Row) -> int:
    """The longest that a row's text may become."""
    return len(row.text) + row.room


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    pairs = zip(first, second, strict=False)
    return next((place for place, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second)))


def _shared_beginning(texts: Sequence[list[int]]) -> list[int]:
    """The tokens that all texts begin with: those that the first and the last in order have in common."""
    first, last = min(texts), max(texts)
    return first[: _common_prefix(first, last)]

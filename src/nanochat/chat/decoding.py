"""One new token per row, step after step, without waiting for the device.

A step feeds every row the token that the step before has drawn, and draws the next. All of that stays on the device.
The host is told of each token, and may have another one fed in a token's place, which is how a tool answers.

On a GPU a step is hundreds of kernels of a few microseconds, which Python launches slower than they run. There the step
is recorded as a CUDA graph, once per batch and in milliseconds: compiling it would take most of a minute.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanochat.model.inference import InferenceModel
from nanochat.model.kv_cache import KVCache, Token

# From logits (B, V), and one number in [0, 1) for each row where tokens are drawn by chance, to tokens (B).
Choose = Callable[[Tensor, Tensor | None], Tensor]

NOTHING_ELSE = -1


@dataclass(frozen=True)
class _OnItsWay:
    """Tokens that are being copied to the host."""

    tokens: Tensor
    arrived: torch.cuda.Event | None

    def wait(self) -> list[int]:
        if self.arrived is not None:
            self.arrived.synchronize()
        tokens: list[int] = self.tokens.tolist()
        return tokens


class Decoding:
    """What a batch has drawn, and draws next.

    Args:
        network: the model.
        cache: it holds the prompts.
        logits_BV: after the prompts.
        choose: picks the tokens.
        numbers_BN: what decides the draw of each row's N tokens; None where nothing is left to chance.
    """

    @torch.inference_mode()
    def __init__(
        self, network: InferenceModel, cache: KVCache, logits_BV: Tensor, choose: Choose, numbers_BN: Tensor | None
    ) -> None:
        self.network = network
        self.cache = cache
        self.choose = choose
        self.numbers_BN = numbers_BN
        self.start_B = cache.positions_B.clone()
        self.instead_B = torch.full_like(self.start_B, NOTHING_ELSE)
        self.has_instead = False
        self.graph: torch.cuda.CUDAGraph | None = None
        self.is_warm = False
        self.tokens_B = choose(logits_BV, self._numbers())
        self._on_their_way: deque[_OnItsWay] = deque()
        self._send()

    def read(self) -> list[int]:
        """What was drawn first of all that has not been read: the only place where the host waits."""
        return self._on_their_way.popleft().wait()

    @torch.inference_mode()
    def step(self, instead: Sequence[int | None]) -> None:
        """Feed each row the token it has drawn last, or the one given in its place, and draw the next."""
        has_instead = any(token is not None for token in instead)
        if has_instead or self.has_instead:
            given = [NOTHING_ELSE if token is None else token for token in instead]
            self.instead_B.copy_(torch.tensor(given), non_blocking=True)
        self.has_instead = has_instead
        try:
            if self.tokens_B.device.type != "cuda" or not self.is_warm:
                # The first one runs as it is: what is loaded or set up at a first call cannot be recorded.
                self._compute()
                self.is_warm = True
            else:
                if self.graph is None:
                    self.graph = torch.cuda.CUDAGraph()
                    # Other threads may pin or allocate memory meanwhile, such as a loader's.
                    with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                        self._compute()
                self.graph.replay()
            self.cache.lengths = [min(length + 1, self.cache.capacity) for length in self.cache.lengths]
        except BaseException:
            # Broken off, it may have overwritten what the rings held: the cache counts as empty.
            self.cache.lengths = [0] * len(self.cache.lengths)
            raise
        self._send()

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows only."""
        self.cache.select(rows)
        index = torch.tensor(rows, device=self.tokens_B.device)
        self.start_B, self.instead_B, self.tokens_B = (x[index] for x in (self.start_B, self.instead_B, self.tokens_B))
        if self.numbers_BN is not None:
            self.numbers_BN = self.numbers_BN[index]
        self.graph, self.is_warm = None, False

    def _compute(self) -> None:
        """A step on the device: it reads and writes tensors that stay where they are, and nothing else."""
        fed_B = torch.where(self.instead_B == NOTHING_ELSE, self.tokens_B, self.instead_B)
        logits_BV = self.network.next_logits(Token(self.cache, fed_B[:, None]))
        self.tokens_B.copy_(self.choose(logits_BV, self._numbers()))

    def _numbers(self) -> Tensor | None:
        """The number of each row's next token: that of its place in the answer, whoever said what is before."""
        if self.numbers_BN is None:
            return None
        place_B1 = (self.cache.positions_B - self.start_B).clamp(max=self.numbers_BN.size(1) - 1)[:, None]
        return self.numbers_BN.gather(1, place_B1)[:, 0]

    def _send(self) -> None:
        """Start the copy to the host. It is queued before the next step, which overwrites its source."""
        if self.tokens_B.device.type != "cuda":
            self._on_their_way.append(_OnItsWay(self.tokens_B.clone(), None))
            return
        # PyTorch takes page-locked memory for a copy that is not waited for.
        copy_B, arrived = self.tokens_B.to("cpu", non_blocking=True), torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record()
        self._on_their_way.append(_OnItsWay(copy_B, arrived))

"""Keys and values of the tokens seen so far, so that the next ones cost only themselves.

Memory is allocated once, for a number of rows and a capacity in tokens. The rows may be of different lengths: each has
its own positions, and new tokens are padded on the right. Padding goes to a spare slot past the capacity that no query
reads, so nothing has to be masked or cleaned up for it later.

Besides keys and values, the modern variant's smear needs the embedding of the last token of each row.

Shapes: B rows, T new tokens, S slots, C channels, H query heads, G key/value heads, D head dimension.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nanochat.config import ModelConfig
from nanochat.model.attention import Attention, masked_attention


class KVCache:
    """What a model remembers of a batch of texts.

    Args:
        config: the model's shape.
        batch_size: rows.
        capacity: tokens per row; at most, and by default, the context.
        device: the model's.
        dtype: the model's compute dtype.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        capacity: int | None = None,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.capacity = min(capacity or config.sequence_len, config.sequence_len)
        # Zeros, not empty: a slot that is masked must still be a finite number, as 0 · NaN is NaN.
        slots = (batch_size, self.capacity + 1, config.n_kv_head, config.head_dim)
        self.keys = [torch.zeros(slots, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.values = [torch.zeros(slots, device=device, dtype=dtype) for _ in range(config.n_layer)]
        # For the smear, before it.
        self.last_embedding_BC = torch.zeros(batch_size, config.n_embd, device=device, dtype=dtype)
        # Kept on the host: it decides shapes, and asking the device for it would wait for the device.
        self.lengths = [0] * batch_size

    def append(self, rows: Sequence[Sequence[int]]) -> "CacheStep":
        """Make room for the next tokens of every row, which the model then computes with the step returned.

        Args:
            rows: at least one token for each row of the cache.

        Raises:
            ValueError: the rows are not those of the cache, or do not fit; nothing has changed then.
        """
        counts = [len(tokens) for tokens in rows]
        if len(counts) != len(self.lengths) or not all(counts):
            raise ValueError(f"a cache of {len(self.lengths)} rows takes as many, none empty; it got {counts} tokens")
        ends = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        if max(ends) > self.capacity:
            raise ValueError(f"a row of {max(ends)} tokens does not fit a cache of {self.capacity}")
        device = self.last_embedding_BC.device
        time = max(counts)
        tokens_BT = torch.tensor([[*tokens, *[0] * (time - len(tokens))] for tokens in rows], device=device)
        offset_1T = torch.arange(time, device=device)[None]
        count_B1, length_B1 = torch.tensor([counts, self.lengths], device=device)[..., None]
        # Padding takes the position of the token before it, so that it attends to something.
        position_BT = length_B1 + torch.minimum(offset_1T, count_B1 - 1)
        slot_BT = torch.where(offset_1T < count_B1, position_BT, self.capacity)
        step = CacheStep(self, tokens_BT, position_BT, slot_BT, count_B1[:, 0], min(self.lengths), max(ends))
        self.lengths = ends
        return step

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order."""
        index = torch.tensor(rows, dtype=torch.long, device=self.last_embedding_BC.device)
        for tensors in (self.keys, self.values):
            # Layer by layer, so that only one of them is there twice at any time.
            for layer, tensor in enumerate(tensors):
                tensors[layer] = tensor[index]
        self.last_embedding_BC = self.last_embedding_BC[index]
        self.lengths = [self.lengths[row] for row in rows]


@dataclass(frozen=True)
class CacheStep:
    """One pass of new tokens through the model, on top of what the cache holds. Made by `KVCache.append`.

    Attributes:
        tokens: the new ones, padded (B, T).
        positions: where in its text each of them is (B, T).
        slots: where in the cache it is kept (B, T).
        counts: how many of each row are not padding (B).
        start: tokens that the shortest row had before.
        end: tokens that the longest row has with them.
    """

    cache: KVCache
    tokens: Tensor
    positions: Tensor
    slots: Tensor
    counts: Tensor
    start: int
    end: int
    _masks: dict[int, Tensor] = field(default_factory=dict)

    def attention(self, layer: int) -> Attention:
        """A layer's attention over the cached and the new tokens; it keeps the new keys and values."""

        def attend(q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, window: int) -> Tensor:
            keys_BSGD, values_BSGD = self.cache.keys[layer], self.cache.values[layer]
            row_B1 = torch.arange(len(keys_BSGD), device=keys_BSGD.device)[:, None]
            keys_BSGD[row_B1, self.slots] = k_BTGD
            values_BSGD[row_B1, self.slots] = v_BTGD
            seen = slice(self._first_slot(window), self.end)
            return masked_attention(q_BTHD, keys_BSGD[:, seen], values_BSGD[:, seen], self._mask(window)[:, None])

        return attend

    def with_last_embedding(self, x_BTC: Tensor) -> Tensor:
        """Put the embedding of the token before in front, (B, 1 + T, C), zero at a start, and keep the newest."""
        extended_BTC = torch.cat((self.cache.last_embedding_BC[:, None], x_BTC), dim=1)
        self.cache.last_embedding_BC = self.last(x_BTC)
        return extended_BTC

    def last(self, x_BTC: Tensor) -> Tensor:
        """What each row's last token that is not padding has, (B, C)."""
        return x_BTC[torch.arange(len(x_BTC), device=x_BTC.device), self.counts - 1]

    def _first_slot(self, window: int) -> int:
        """The first slot that any row still sees."""
        return max(0, self.start - window)

    def _mask(self, window: int) -> Tensor:
        """Which slots each new token sees. One per window and step, as layers share it."""
        if window not in self._masks:
            slot_S = torch.arange(self._first_slot(window), self.end, device=self.positions.device)
            distance_BTS = self.positions[..., None] - slot_S
            self._masks[window] = (distance_BTS >= 0) & (distance_BTS <= window)
        return self._masks[window]

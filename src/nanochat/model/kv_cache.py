"""Keys and values of the tokens seen so far, so that the next ones cost only themselves.

Memory is allocated once, for a number of rows and a capacity in tokens. A layer with a window keeps only what the
window still shows: its slots are a ring, and the token at position p is in slot p mod S. Rows differ in length.

New tokens come in one of two ways. A `Chunk` is any number for each row, padded on the right; padding goes to a spare
slot past the ring that no query reads. A `Token` is one for each row; its shapes are always the same and all it needs
is on the device, so the pass can be recorded as a CUDA graph.

Besides keys and values, the modern variant's smear needs the last token of each row.

Shapes: B rows, T new tokens, S slots, H query heads, G key/value heads, D head dimension.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanochat.config import ModelConfig
from nanochat.model.attention import VARLEN_HAS_OPTIONS, Attention, masked_attention

# So many keys, in elements, are copied to float32 at once on a CPU: as many as stay in its cache.
ELEMENTS_AT_ONCE = 2**20


class KVCache:
    """What a model remembers of a batch of texts.

    Args:
        config: the model's shape.
        batch_size: rows.
        capacity: tokens per row; at most, and by default, the context.
        windows: of each layer; by default those of the shape.
        device: the model's.
        dtype: the model's compute dtype.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        capacity: int | None = None,
        *,
        windows: Sequence[int] | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.capacity = min(capacity or config.sequence_len, config.sequence_len)
        self.slots = [min(window + 1, self.capacity) for window in windows or config.windows]

        def allocate(slots: int) -> Tensor:
            # Zeros, not empty: a slot that is masked must still be a finite number, as 0 · NaN is NaN.
            shape = (batch_size, slots + 1, config.n_kv_head, config.head_dim)
            if device is not None and device.type == "cuda":
                return torch.zeros(shape, device=device, dtype=dtype)
            # On a CPU the slots of a head lie together, which is what its matmuls take without a copy.
            return torch.zeros([shape[axis] for axis in (0, 2, 1, 3)], device=device, dtype=dtype).transpose(1, 2)

        self.keys = [allocate(slots) for slots in self.slots]
        self.values = [allocate(slots) for slots in self.slots]
        self.row_B1 = torch.arange(batch_size, device=device)[:, None]
        self.row_starts = torch.arange(batch_size + 1, dtype=torch.int32, device=device)
        self.previous_B = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.positions_B = torch.zeros(batch_size, dtype=torch.long, device=device)
        # The same as the positions, on the host: asking the device for it would wait for the device.
        self.lengths = [0] * batch_size

    def append(self, rows: Sequence[Sequence[int]]) -> "Chunk":
        """Make room for the next tokens of every row, which the model then computes with the chunk returned.

        Until it has, the cache counts as empty: a pass that was broken off has overwritten what its rings held.

        Args:
            rows: the tokens of each row of the cache; of some, but not of all, there may be none.

        Raises:
            ValueError: the rows are not those of the cache, or do not fit; nothing has changed then.
        """
        counts = [len(tokens) for tokens in rows]
        if len(counts) != len(self.lengths) or not any(counts):
            raise ValueError(f"a cache of {len(self.lengths)} rows takes as many, not all empty; got {counts} tokens")
        starts, ends = self.lengths, [length + count for length, count in zip(self.lengths, counts, strict=True)]
        if max(ends) > self.capacity:
            raise ValueError(f"a row of {max(ends)} tokens does not fit a cache of {self.capacity}")
        time = max(counts)
        padded = [[*tokens, *[0] * (time - len(tokens))] for tokens in rows]
        tokens_BT = torch.tensor(padded, device=self.positions_B.device)
        counts_B = torch.tensor(counts, device=self.positions_B.device)
        self.lengths = [0] * len(starts)
        return Chunk(self, tokens_BT, counts_B, max(starts), ends)

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order; one that is named twice is there twice."""
        index = torch.tensor(rows, dtype=torch.long, device=self.positions_B.device)
        for tensors in (self.keys, self.values):
            # Layer by layer, so that only one of them is there twice at any time.
            for layer, tensor in enumerate(tensors):
                # index_select keeps no memory order, and the cache has one.
                order = (0, 2, 1, 3) if tensor.device.type != "cuda" else (0, 1, 2, 3)
                tensors[layer] = tensor.permute(order).index_select(0, index).permute(order)
        self.previous_B, self.positions_B = self.previous_B[index], self.positions_B[index]
        self.row_B1 = torch.arange(len(rows), device=index.device)[:, None]
        self.row_starts = torch.arange(len(rows) + 1, dtype=torch.int32, device=index.device)
        self.lengths = [self.lengths[row] for row in rows]

    def can_return_to(self, length: int) -> bool:
        """Whether the rings still hold all that the token after the first `length` ones sees."""
        longest = max(self.lengths)
        return longest >= length and (length == 0 or all(longest <= max(slots, length + 1) for slots in self.slots))

    def return_to(self, text: Sequence[int]) -> None:
        """Forget what comes after this beginning of all rows, to which it can return."""
        self.lengths = [len(text)] * len(self.lengths)
        self.positions_B.fill_(len(text))
        if text:
            self.previous_B.fill_(text[-1])


@dataclass(frozen=True)
class Chunk:
    """One pass of new tokens through the model, on top of what the cache holds. Made by `KVCache.append`.

    Attributes:
        tokens: the new ones, padded (B, T).
        counts: how many of each row are not padding (B).
        longest: tokens that the longest row had before.
        ends: tokens that each row has with them.
    """

    cache: KVCache
    tokens: Tensor
    counts: Tensor
    longest: int
    ends: list[int]
    _slots: dict[int, Tensor] = field(default_factory=dict)
    _masks: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    @property
    def positions(self) -> Tensor:
        """Where in its text each new token is; padding, which nothing that is real sees, past the end too (B, T)."""
        return self.cache.positions_B[:, None] + torch.arange(self.tokens.size(1), device=self.tokens.device)

    def attend(
        self, layer: int, q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, window: int, attention: Attention
    ) -> Tensor:
        """A layer's attention over the cached and the new tokens; it keeps the new keys and values."""
        keys_BSGD, values_BSGD, slots = self.cache.keys[layer], self.cache.values[layer], self.cache.slots[layer]
        old = slice(min(slots, self.longest))
        if self.longest == 0:
            y_BTHD = attention(q_BTHD, k_BTGD, v_BTGD, window)
        else:
            # Before they are written: in a ring the last of them may take the place of what the first still sees.
            seen_keys, seen_values = (
                torch.cat((cached[:, old], new), dim=1) for cached, new in ((keys_BSGD, k_BTGD), (values_BSGD, v_BTGD))
            )
            y_BTHD = _masked(q_BTHD, seen_keys, seen_values, self._mask(slots, window)[:, None])
        slot_BT = self._slot(slots)
        keys_BSGD[self.cache.row_B1, slot_BT] = k_BTGD
        values_BSGD[self.cache.row_B1, slot_BT] = v_BTGD
        return y_BTHD

    def last(self, x_BTC: Tensor) -> Tensor:
        """What each row's last token that is not padding has, (B, C)."""
        return x_BTC[self.cache.row_B1[:, 0], (self.counts - 1).clamp(min=0)]

    def finish(self) -> None:
        """Count the new tokens, once all layers have them."""
        cache = self.cache
        last_B = torch.where(self.counts > 0, self.last(self.tokens), cache.previous_B)
        cache.previous_B.copy_(last_B)
        cache.positions_B.add_(self.counts)
        cache.lengths = self.ends

    def _slot(self, slots: int) -> Tensor:
        """Where each new token is kept, in a ring of so many slots."""
        if slots not in self._slots:
            offset_T = torch.arange(self.tokens.size(1), device=self.tokens.device)
            count_B1 = self.counts[:, None]
            # What later ones of the same chunk would overwrite is not written: in which order would be left to chance.
            is_kept_BT = (offset_T < count_B1) & (offset_T >= count_B1 - slots)
            self._slots[slots] = torch.where(is_kept_BT, self.positions % slots, slots)
        return self._slots[slots]

    def _mask(self, slots: int, window: int) -> Tensor:
        """Which cached and new tokens each new token sees, (B, T, S + T); layers share it."""
        key = (slots, window)
        if key not in self._masks:
            position_BT, newest_B1 = self.positions, self.cache.positions_B[:, None] - 1
            slot_S = torch.arange(min(slots, self.longest), device=position_BT.device)
            # The newest position that is in this slot; negative if there is none.
            held_BS = newest_B1 - (newest_B1 - slot_S) % slots
            distance_BTS = position_BT[:, :, None] - torch.cat((held_BS, position_BT), dim=1)[:, None]
            is_held_BS = torch.cat((held_BS >= 0, torch.ones_like(position_BT, dtype=torch.bool)), dim=1)
            self._masks[key] = (distance_BTS >= 0) & (distance_BTS <= window) & is_held_BS[:, None]
        return self._masks[key]


@dataclass(frozen=True)
class _Ring:
    """Rows of so many slots at a step of one token.

    Attributes:
        slot: where each row keeps its token (B, 1).
        seen: how many slots it sees, int32 (B); None where every row sees all that are looked at.
        looked_at: how many of the slots are looked at, whether or not a row sees them.
        query_starts: where each row's query begins if they stand one after the other, and where all end (B + 1).
        key_starts: the same of the cache's slots, the spare ones included.
    """

    slot: Tensor
    seen: Tensor | None
    looked_at: int
    query_starts: Tensor
    key_starts: Tensor


@dataclass(frozen=True)
class Token:
    """One pass of one new token per row, on top of what the cache holds, without a word from the host.

    Attributes:
        tokens: the new ones (B, 1).
    """

    cache: KVCache
    tokens: Tensor
    _rings: dict[int, _Ring] = field(default_factory=dict)

    @property
    def positions(self) -> Tensor:
        """Where in its text each new token is (B, 1)."""
        return self.cache.positions_B[:, None]

    def attend(
        self, layer: int, q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, window: int, attention: Attention
    ) -> Tensor:
        """A layer's attention over the cached and the new tokens; it keeps the new keys and values.

        Neither window nor mask: the ring holds what the window shows, in any order, which attention does not care for.
        """
        keys_BSGD, values_BSGD, slots = self.cache.keys[layer], self.cache.values[layer], self.cache.slots[layer]
        ring = self._ring(slots)
        keys_BSGD[self.cache.row_B1, ring.slot] = k_BTGD
        values_BSGD[self.cache.row_B1, ring.slot] = v_BTGD
        return _attend_to_ring(q_BTHD, keys_BSGD, values_BSGD, ring)

    def last(self, x_BTC: Tensor) -> Tensor:
        """What each row's token has, (B, C)."""
        return x_BTC[:, 0]

    def finish(self) -> None:
        """Count the new tokens on the device. Rows that have ended may go on; they stay at the last position."""
        self.cache.previous_B.copy_(self.tokens[:, 0])
        self.cache.positions_B.add_(1).clamp_(max=self.cache.capacity - 1)

    def _ring(self, slots: int) -> _Ring:
        """What layers of so many slots share."""
        if slots not in self._rings:
            cache = self.cache
            looked_at, sees_all = slots, False
            if cache.positions_B.device.type != "cuda":
                looked_at = min(slots, max(cache.lengths) + 1)
                sees_all = min(cache.lengths) + 1 >= looked_at
            self._rings[slots] = _Ring(
                slot=cache.positions_B[:, None] % slots,
                seen=None if sees_all else (cache.positions_B + 1).clamp(max=slots).to(torch.int32),
                looked_at=looked_at,
                query_starts=cache.row_starts,
                key_starts=cache.row_starts * (slots + 1),
            )
        return self._rings[slots]


def _attend_to_ring(q_BTHD: Tensor, keys_BSGD: Tensor, values_BSGD: Tensor, ring: _Ring) -> Tensor:
    """Attention of one query per row, T = 1, to the slots that it sees."""
    device, dtype = q_BTHD.device, q_BTHD.dtype
    if ring.seen is not None and has_flash_attention(device, dtype, q_BTHD.size(-1)) and VARLEN_HAS_OPTIONS:
        # Here, as the module imports torch._dynamo, which takes a second and fixes where compiled code is kept.
        from torch.nn.attention.varlen import varlen_attn

        # Each row is a sequence of which so much is used; what is not used is not even read.
        y_BHD = varlen_attn(
            q_BTHD.flatten(0, 1),
            keys_BSGD.flatten(0, 1),
            values_BSGD.flatten(0, 1),
            ring.query_starts,
            ring.key_starts,
            1,
            keys_BSGD.size(1),
            seqused_k=ring.seen,
            enable_gqa=q_BTHD.size(2) != keys_BSGD.size(2),
        )
        assert isinstance(y_BHD, Tensor)
        return y_BHD.view(q_BTHD.shape)
    keys_BSGD, values_BSGD = keys_BSGD[:, : ring.looked_at], values_BSGD[:, : ring.looked_at]
    mask_B11S = None
    if ring.seen is not None:
        mask_B11S = (torch.arange(ring.looked_at, device=device) < ring.seen[:, None])[:, None, None]
    if device.type == "cuda" or dtype == torch.float32:
        return _masked(q_BTHD, keys_BSGD, values_BSGD, mask_B11S)
    # On a CPU PyTorch's kernel for one query takes four times as long in bfloat16 as in float32, copies included. Two
    # matmuls in bfloat16 are slower as well: oneDNN compiles one for each number of slots it has not met.
    rows = max(1, ELEMENTS_AT_ONCE // keys_BSGD[0].numel())
    masks: Iterable[Tensor | None] = itertools.repeat(None) if mask_B11S is None else torch.split(mask_B11S, rows)
    pieces = zip(*(torch.split(x, rows) for x in (q_BTHD, keys_BSGD, values_BSGD)), masks, strict=False)
    return torch.cat([masked_attention(q.float(), k.float(), v.float(), mask).to(dtype) for q, k, v, mask in pieces])


def has_flash_attention(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether PyTorch's FlashAttention, which takes heads of up to 256 channels, runs on this device."""
    if device.type != "cuda" or dtype == torch.float32 or head_dim % 8 or head_dim > 256:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _masked(q_BTHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, mask: Tensor | None) -> Tensor:
    if q_BTHD.device.type != "cuda":
        return masked_attention(q_BTHD, k_BSGD, v_BSGD, mask)
    # Lengths change from call to call, and cuDNN, which PyTorch may prefer, plans anew for each.
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return masked_attention(q_BTHD, k_BSGD, v_BSGD, mask)

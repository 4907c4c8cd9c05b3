"""Which rank owns which shard of a bank, and the collectives that bring shards there and back, in place.

With one node, or nodes that differ, the ranks exchange banks all at once. With N nodes of L ranks each they do so
at two levels, since the network between nodes is many times slower than the links inside one: gradients are
reduce-scattered within each node first, and then what is left, 1/L of the bank, across the nodes among the ranks of
the same place; parameters go back the same way. A ring over all ranks takes nearly the whole bank over the network
into each node, in NL - 1 steps; two levels take (N - 1)/N of it, half with two nodes, in N - 1 steps.

The other way to have two levels, as HSDP does, is to all-reduce across nodes and let every node repeat the same
update. It moves no fewer bytes, multiplies optimizer state and work by N, and would let weights drift apart in
silence where two nodes round differently. Here each weight is computed once and copied.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat.runtime import Nodes

# PyTorch 2.13 renamed both, and warns about the old names.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class _Level:
    """A group of ranks that split among them what the level before left to each of its own; None is all ranks."""

    group: dist.ProcessGroup | None
    size: int
    index: int


class Ranks:
    """All ranks of the default process group as owners of shards, or this process alone where there is none.

    Attributes:
        rank: of this process.
        world_size: how many ranks, and so shards, there are.
        shard: which shard of every bank is this rank's.

    Args:
        device: where the banks are.
        nodes: the ranks by node, for two levels.
    """

    def __init__(self, device: torch.device, nodes: Nodes | None = None) -> None:
        self.rank, self.world_size = 0, 1
        self._levels: list[_Level] = []
        self._stream: torch.cuda.Stream | None = None
        if dist.is_available() and dist.is_initialized():
            self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        if nodes is not None:
            node, place = divmod(self.rank, nodes.ranks_per_node)
            num_nodes = self.world_size // nodes.ranks_per_node
            self._levels = [_Level(nodes.within, nodes.ranks_per_node, place), _Level(nodes.across, num_nodes, node)]
            # The second level waits for the first, and what is computed meanwhile shall not.
            if device.type == "cuda":
                self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # As in torch.
        elif self.world_size > 1:
            self._levels = [_Level(None, self.world_size, self.rank)]
        # The same for every rank, so that state can be gathered in the order of shards.
        self._shards = [
            rank if nodes is None else rank % nodes.ranks_per_node * num_nodes + rank // nodes.ranks_per_node
            for rank in range(self.world_size)
        ]
        self.shard = self._shards[self.rank]

    def own_part(self, bank: Tensor) -> Tensor:
        """This rank's shard of a flat bank, as a view."""
        size = bank.numel() // self.world_size
        return bank.narrow(0, self.shard * size, size)

    def start_reduce_scatter(self, bank: Tensor) -> dist.Work | None:
        """Begin to sum this rank's shard over all ranks, in place; the rest of the bank is scratch afterwards.

        Collective, as are all that follow. A sum, since not every backend can average. On a GPU nothing waits but
        the device's own streams. With gloo the first of two levels is waited for here.

        Returns:
            What to wait for; None if there is nothing to do.
        """
        work: dist.Work | None = None
        with self._beside_the_computation():
            for level in self._levels:
                if work is not None:
                    work.wait()
                part = _part(bank, level)
                work = _reduce_scatter(part, bank, group=level.group, async_op=True)
                bank = part
        return work

    def start_all_gather(self, bank: Tensor) -> dist.Work | None:
        """Begin to collect every rank's shard of a bank, in place.

        Returns:
            What to wait for; None if there is nothing to do.
        """
        wholes = [bank]
        for level in self._levels:
            wholes.append(_part(wholes[-1], level))
        work: dist.Work | None = None
        with self._beside_the_computation():
            for level, whole, part in reversed(list(zip(self._levels, wholes[:-1], wholes[1:], strict=True))):
                if work is not None:
                    work.wait()
                work = _all_gather(whole, part, group=level.group, async_op=True)
        return work

    def gather_to_main(self, shard: Tensor) -> Tensor | None:
        """Concatenate the ranks' shards along the first dimension, on rank 0."""
        if self.world_size == 1:
            return shard
        if self.rank != 0:
            dist.gather(shard, dst=0)
            return None
        gathered = shard.new_empty(self.world_size, *shard.shape)
        dist.gather(shard, [gathered[owned] for owned in self._shards], dst=0)
        return gathered.flatten(0, 1)

    def _beside_the_computation(self) -> AbstractContextManager[object]:
        """A stream in which the levels wait for each other, after all that the caller's stream was given so far."""
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        return torch.cuda.stream(self._stream)


def _part(bank: Tensor, level: _Level) -> Tensor:
    size = bank.numel() // level.size
    return bank.narrow(0, level.index * size, size)

"""Which ranks count as nodes that exchange at two levels, by what a launcher tells each of them."""

import pytest
import torch.distributed as dist

from distributed import run_distributed
from nanochat import runtime


def nodes_of(places: list[tuple[str, int, int]]) -> tuple[list[int], list[int]] | None:
    host, local_rank, local_world_size = places[dist.get_rank()]
    # The one thing that ranks of one machine cannot have of their own.
    runtime.platform.node = lambda: host
    if not runtime._are_nodes_alike(local_rank, local_world_size):
        return None
    nodes = runtime.form_nodes(local_world_size)
    assert nodes.ranks_per_node == local_world_size
    return dist.get_process_group_ranks(nodes.within), dist.get_process_group_ranks(nodes.across)


def test_two_nodes_of_two_ranks_are_nodes() -> None:
    places = [("a", 0, 2), ("a", 1, 2), ("b", 0, 2), ("b", 1, 2)]
    assert run_distributed(nodes_of, 4, places) == [
        ([0, 1], [0, 2]),
        ([0, 1], [1, 3]),
        ([2, 3], [0, 2]),
        ([2, 3], [1, 3]),
    ]


@pytest.mark.parametrize(
    "places",
    [
        pytest.param([("a", 0, 2), ("a", 1, 2)], id="one node"),
        pytest.param([("a", 0, 1), ("b", 0, 1)], id="one rank on each"),
        pytest.param([("a", 0, 2), ("a", 1, 2), ("b", 0, 1)], id="of different sizes"),
        pytest.param([("a", 0, 2), ("b", 0, 2), ("a", 1, 2), ("b", 1, 2)], id="numbered in turns"),
        pytest.param([("a", 0, 2), ("b", 1, 2), ("b", 0, 2), ("a", 1, 2)], id="numbered at random"),
    ],
)
def test_ranks_that_do_not_form_such_nodes_exchange_all_at_once(places: list[tuple[str, int, int]]) -> None:
    assert run_distributed(nodes_of, len(places), places) == [None] * len(places)

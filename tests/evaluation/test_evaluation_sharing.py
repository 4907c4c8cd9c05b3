"""Problems among ranks: each answered once, in batches that do not depend on the number of ranks."""

import pytest
from examinees import CPU, rank_runtime
from hypothesis import given
from hypothesis import strategies as st

from distributed import run_distributed
from nanochat.evaluation.sharing import answer_all
from nanochat.runtime import Runtime
from nanochat.tracking.console import Console

LENGTHS = [3, 9, 1, 9, 4, 7, 2]


def batches_of(lengths: list[int], batch_size: int, runtime: Runtime) -> list[list[int]]:
    """Answer each problem with the batch it is in."""
    return answer_all(
        range(len(lengths)),
        lengths.__getitem__,
        lambda batch: [batch] * len(batch),
        runtime,
        batch_size,
        console=Console(enabled=False),
        description="test",
    )


@given(st.lists(st.integers(0, 50), max_size=40), st.integers(1, 12))
def test_each_problem_is_in_one_batch_and_has_its_own_answer(lengths: list[int], batch_size: int) -> None:
    batches = batches_of(lengths, batch_size, CPU)
    assert len(batches) == len(lengths)
    assert all(index in batch and len(batch) <= batch_size for index, batch in enumerate(batches))
    assert sum(1 / len(batch) for batch in batches) == pytest.approx(-(-len(lengths) // batch_size))


def test_a_batch_holds_problems_of_like_length_the_longest_first() -> None:
    batches = batches_of(LENGTHS, 3, CPU)
    assert sorted(map(tuple, {tuple(batch) for batch in batches})) == [(1, 3, 5), (2,), (4, 0, 6)]


def on_a_rank() -> list[list[int]]:
    return batches_of(LENGTHS, 2, rank_runtime())


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_batches_are_the_same_on_any_number_of_ranks(world_size: int) -> None:
    assert run_distributed(on_a_rank, world_size) == [batches_of(LENGTHS, 2, CPU)] * world_size

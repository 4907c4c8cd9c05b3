import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.loader.order import NaturalOrder, Permutation, ShuffledOrder

POWERS_AND_NEIGHBOURS = [n for p in range(1, 15) for n in (2**p - 1, 2**p, 2**p + 1)]


def whole(size: int, seed: int = 0, epoch: int = 0) -> np.ndarray:
    return Permutation(size, seed, epoch)(np.arange(size))


@pytest.mark.parametrize("size", sorted({1, 2, 3, 5, 6, 7, 10_007, *POWERS_AND_NEIGHBOURS}))
def test_every_item_stands_at_exactly_one_position(size: int) -> None:
    assert np.array_equal(np.sort(whole(size)), np.arange(size))


@given(size=st.integers(1, 3000), seed=st.integers(), epoch=st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_every_seed_and_epoch_permutes_every_size(size: int, seed: int, epoch: int) -> None:
    assert np.array_equal(np.sort(whole(size, seed, epoch)), np.arange(size))


@given(size=st.integers(1, 2**62), seed=st.integers(0, 9), data=st.data())
@settings(max_examples=100, deadline=None)
def test_a_position_can_be_read_alone_in_a_list_too_long_to_store(size: int, seed: int, data: st.DataObject) -> None:
    positions = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=50, unique=True))
    permutation = Permutation(size, seed, 0)
    items = permutation(np.array(positions))
    assert ((items >= 0) & (items < size)).all()
    assert len(set(items.tolist())) == len(positions)
    assert [permutation(np.array([position]))[0] for position in positions] == items.tolist()


def test_the_order_never_changes_between_versions_of_this_project() -> None:
    assert whole(10, seed=42, epoch=3).tolist() == [6, 0, 9, 5, 8, 7, 1, 2, 4, 3]


def test_seeds_and_epochs_have_unrelated_orders() -> None:
    size = 10_000
    orders = [whole(size, seed, epoch) for seed in (0, 1, 2) for epoch in (0, 1, 2)]
    for i, order in enumerate(orders):
        for other in orders[:i]:
            # Two random permutations agree in one place on average; 12 or more is a chance of 1 in 10^9.
            assert (order == other).sum() < 12
            assert abs(np.corrcoef(order, other)[0, 1]) < 0.06


@pytest.mark.parametrize("size", [1000, 1024, 9973, 65_537])
def test_an_order_looks_like_a_random_one(size: int) -> None:
    orders = [whole(size, seed) for seed in range(40)]
    positions = np.arange(size)
    fixed_points = np.mean([(order == positions).sum() for order in orders])
    displacement = np.mean([np.abs(order - positions).mean() for order in orders]) / size
    ascents = np.mean([(np.diff(order) > 0).mean() for order in orders])
    neighbours = np.mean([(np.abs(np.diff(order)) == 1).sum() for order in orders])
    # Expected for a uniform permutation: 1, 1/3, 1/2 and 2, here over 40 draws with room for 6 deviations.
    assert abs(fixed_points - 1) < 0.95
    assert abs(displacement - 1 / 3) < 0.01
    assert abs(ascents - 1 / 2) < 0.01
    assert abs(neighbours - 2) < 1.4


def test_all_orders_of_four_items_occur_about_equally_often() -> None:
    counts = np.unique([whole(4, seed) for seed in range(4800)], axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert counts.min() > 120
    assert counts.max() < 280


@given(
    num_documents=st.integers(1, 5000),
    num_lanes=st.integers(1, 64),
    epoch=st.integers(0, 3),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_the_lanes_share_every_document_out_exactly_once(
    num_documents: int, num_lanes: int, epoch: int, data: st.DataObject
) -> None:
    taken: list[int] = []
    for lane in range(num_lanes):
        order = ShuffledOrder(num_documents, 5, lane, num_lanes)
        position = 0
        while len(block := order.block(epoch, position)):
            # A lane that was resumed asks again from the middle of a block.
            used = data.draw(st.integers(len(block) // 4 + 1, len(block))) if num_lanes < 4 else len(block)
            taken += block[:used].tolist()
            position += used
    assert sorted(taken) == list(range(num_documents))


def test_the_natural_order_is_the_order_on_disk_in_every_epoch() -> None:
    order = NaturalOrder(2500)
    for epoch in (0, 7):
        documents: list[int] = []
        while len(block := order.block(epoch, len(documents))):
            documents += block.tolist()
        assert documents == list(range(2500))

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nanochat.loader.order import NaturalOrder, ShuffledOrder
from nanochat.loader.packing import Lane, LaneState, Remainders
from nanochat.loader.token_shards import Piece

documents = st.lists(st.integers(1, 80), min_size=1, max_size=60)
row_sizes = st.integers(2, 40)
pool_sizes = st.integers(1, 20)
remainder_kinds = st.sampled_from(["keep", "drop", "pad"])


def lane_of(
    lengths: list[int],
    row_size: int,
    pool_size: int = 8,
    remainders: Remainders = "keep",
    state: LaneState | None = None,
    natural: bool = False,
) -> Lane:
    array = np.array(lengths)

    def lengths_of(documents: NDArray[np.int64]) -> NDArray[np.int64]:
        chosen: NDArray[np.int64] = array[documents]
        return chosen

    order = NaturalOrder(len(lengths)) if natural else ShuffledOrder(len(lengths), 1, 0, 1)
    return Lane(order, lengths_of, row_size=row_size, pool_size=pool_size, remainders=remainders, state=state)


def size_of(piece: Piece) -> int:
    _, start, stop = piece
    return stop - start + (start > 0)


@given(documents, row_sizes, pool_sizes, st.sampled_from(["keep", "drop"]), st.integers(1, 60))
@settings(max_examples=100, deadline=None)
def test_every_row_is_full_and_begins_with_bos(
    lengths: list[int], row_size: int, pool_size: int, remainders: Remainders, num_rows: int
) -> None:
    lane = lane_of(lengths, row_size, pool_size, remainders)
    for _ in range(num_rows):
        row = lane.next_row()
        assert sum(map(size_of, row)) == row_size
        for document, start, stop in row:
            assert 0 <= start <= stop <= lengths[document]
            assert size_of((document, start, stop)) > 0


@given(documents, row_sizes, pool_sizes, st.integers(1, 80))
@settings(max_examples=100, deadline=None)
def test_kept_remainders_deliver_every_token_of_every_document_exactly_once_per_epoch(
    lengths: list[int], row_size: int, pool_size: int, num_rows: int
) -> None:
    lane = lane_of(lengths, row_size, pool_size)
    delivered: Counter[tuple[int, int]] = Counter()
    for _ in range(num_rows):
        for document, start, stop in lane.next_row():
            delivered.update((document, place) for place in range(start, stop))
    state = lane.state()
    # What is delivered is all of the earlier epochs, and of this one all that was taken and is not pending.
    expected: Counter[tuple[int, int]] = Counter()
    everything = [(document, place) for document, n in enumerate(lengths) for place in range(n)]
    for _ in range(state.epoch):
        expected.update(everything)
    order = ShuffledOrder(len(lengths), 1, 0, 1).block(state.epoch, 0)
    for document in order[: state.position].tolist():
        expected.update((document, place) for place in range(lengths[document]))
    for document, start, _ in state.pending:
        expected.subtract((document, place) for place in range(start, lengths[document]))
    assert delivered == +expected
    assert state.counts.rows * row_size == delivered.total() + state.counts.added_bos
    assert state.counts.cropped == 0


@given(documents, row_sizes, pool_sizes, st.integers(1, 80))
@settings(max_examples=100, deadline=None)
def test_dropped_remainders_are_counted_to_the_token(
    lengths: list[int], row_size: int, pool_size: int, num_rows: int
) -> None:
    lane = lane_of(lengths, row_size, pool_size, "drop")
    pieces = [piece for _ in range(num_rows) for piece in lane.next_row()]
    counts = lane.state().counts
    assert all(start == 0 for _, start, _ in pieces)
    assert counts.cropped == sum(lengths[document] - stop for document, _, stop in pieces)
    assert counts.documents == len(pieces)
    assert counts.added_bos == 0
    began = Counter(document for document, _, _ in pieces)
    assert max(began.values()) - min((began[d] for d in range(len(lengths))), default=0) <= 1


@given(documents, row_sizes, pool_sizes, st.integers(1, 80))
@settings(max_examples=100, deadline=None)
def test_padded_rows_hold_whole_documents_and_every_place_left_empty_is_counted(
    lengths: list[int], row_size: int, pool_size: int, num_rows: int
) -> None:
    lane = lane_of(lengths, row_size, pool_size, "pad")
    rows = [lane.next_row() for _ in range(num_rows)]
    for row in rows:
        assert 0 < sum(map(size_of, row)) <= row_size
        # Only what no row could hold is cropped, and to a whole row.
        assert all((start, stop) == (0, min(lengths[document], row_size)) for document, start, stop in row)
    pieces = [piece for row in rows for piece in row]
    counts = lane.state().counts
    assert (counts.rows, counts.documents, counts.added_bos) == (num_rows, len(pieces), 0)
    assert counts.padded == num_rows * row_size - sum(map(size_of, pieces))
    assert counts.cropped == sum(lengths[document] - stop for document, _, stop in pieces)


@given(documents, row_sizes, pool_sizes)
@settings(max_examples=100, deadline=None)
def test_a_row_is_padded_only_where_nothing_that_is_pending_fits(
    lengths: list[int], row_size: int, pool_size: int
) -> None:
    lane = lane_of(lengths, row_size, pool_size, "pad")
    for _ in range(30):
        padded_before = lane.state().counts.padded
        lane.next_row()
        state = lane.state()
        padding = state.counts.padded - padded_before
        assert not padding or (state.pending and all(size > padding for _, _, size in state.pending))


@given(documents, row_sizes, pool_sizes, remainder_kinds)
@settings(max_examples=100, deadline=None)
def test_an_epoch_is_delivered_whole_before_the_next_one_begins(
    lengths: list[int], row_size: int, pool_size: int, remainders: Remainders
) -> None:
    lane = lane_of(lengths, row_size, pool_size, remainders)
    begun: list[int] = []
    while len(begun) < 3 * len(lengths):
        begun += [document for document, start, _ in lane.next_row() if start == 0]
    for epoch in range(3):
        one_epoch = begun[epoch * len(lengths) : (epoch + 1) * len(lengths)]
        assert sorted(one_epoch) == list(range(len(lengths)))


@given(documents, row_sizes, pool_sizes, remainder_kinds, st.integers(0, 40))
@settings(max_examples=100, deadline=None)
def test_a_lane_resumed_from_json_makes_the_same_rows(
    lengths: list[int], row_size: int, pool_size: int, remainders: Remainders, rows_before: int
) -> None:
    lane = lane_of(lengths, row_size, pool_size, remainders)
    for _ in range(rows_before):
        lane.next_row()
    state = LaneState.from_json(json.loads(json.dumps(lane.state().to_json())))
    assert state == lane.state()
    resumed = lane_of(lengths, row_size, pool_size, remainders, state)
    for _ in range(20):
        assert resumed.next_row() == lane.next_row()
    assert resumed.state() == lane.state()


@given(documents, row_sizes, st.integers(2, 20))
@settings(max_examples=60, deadline=None)
def test_a_row_takes_the_oldest_first_and_then_always_the_longest_that_fits(
    lengths: list[int], row_size: int, pool_size: int
) -> None:
    lane = lane_of(lengths, row_size, pool_size)
    for _ in range(15):
        before = lane.state()
        row = lane.next_row()
        if before.pending:
            assert row[0][:2] == before.pending[0][:2]
        space = row_size - size_of(row[0])
        for document, start, stop in row[1:]:
            whole = lengths[document] - start + (start > 0)
            # Those pending at the row's begin and not used in it were there to be chosen all along.
            used = {piece[:2] for piece in row}
            rivals = [size for document, start, size in before.pending if (document, start) not in used]
            if stop == lengths[document]:
                assert not [rival for rival in rivals if whole < rival <= space]
            else:
                assert not [rival for rival in rivals if rival <= space]
            space -= size_of((document, start, stop))


@pytest.mark.parametrize(
    ("lengths", "rows"),
    [
        # The longest that fits, though a shorter one is older; of two equal ones the older.
        ([5, 2, 3], [[(0, 0, 5), (2, 0, 3)]]),
        ([5, 3, 3], [[(0, 0, 5), (1, 0, 3)]]),
        # Exactly a row; one token more; the row's last place alone; BOS alone; much more than a row.
        ([8], [[(0, 0, 8)], [(0, 0, 8)]]),
        ([9], [[(0, 0, 8)], [(0, 8, 9), (0, 0, 6)], [(0, 6, 9), (0, 0, 4)]]),
        ([7, 4], [[(0, 0, 7), (1, 0, 1)], [(1, 1, 4), (1, 0, 4)], [(0, 0, 7), (1, 0, 1)]]),
        ([1], [[(0, 0, 1)] * 8]),
        ([24], [[(0, 0, 8)], [(0, 8, 15)], [(0, 15, 22)], [(0, 22, 24), (0, 0, 5)]]),
    ],
)
def test_rows_are_filled_and_documents_cut_as_expected(lengths: list[int], rows: list[list[Piece]]) -> None:
    lane = lane_of(lengths, row_size=8, natural=True)
    assert [lane.next_row() for _ in rows] == rows


def test_a_document_longer_than_a_row_is_cropped_once_when_remainders_are_dropped() -> None:
    lane = lane_of([20], row_size=8, remainders="drop")
    assert [lane.next_row(), lane.next_row()] == [[(0, 0, 8)], [(0, 0, 8)]]
    assert lane.state().counts.cropped == 24


@pytest.mark.parametrize(
    ("lengths", "rows", "padded"),
    [
        # What fits exactly; a place too few, and the next epoch's where there is room for it; much more than a row; a
        # short one past its longer neighbours.
        ([5, 3, 8], [[(0, 0, 5), (1, 0, 3)], [(2, 0, 8)]], 0),
        ([5, 4], [[(0, 0, 5)], [(1, 0, 4), (1, 0, 4)], [(0, 0, 5)]], 6),
        ([24], [[(0, 0, 8)], [(0, 0, 8)]], 0),
        ([6, 7, 9, 2], [[(0, 0, 6), (3, 0, 2)], [(1, 0, 7)], [(2, 0, 8)]], 1),
    ],
)
def test_rows_are_padded_as_expected(lengths: list[int], rows: list[list[Piece]], padded: int) -> None:
    lane = lane_of(lengths, row_size=8, natural=True, remainders="pad")
    assert [lane.next_row() for _ in rows] == rows
    assert lane.state().counts.padded == padded


@given(documents, row_sizes, pool_sizes, st.integers(0, 60), remainder_kinds)
@settings(max_examples=60, deadline=None)
def test_whatever_is_pending_has_been_delivered_after_as_many_rows_as_there_are_pieces(
    lengths: list[int], row_size: int, pool_size: int, rows_before: int, remainders: Remainders
) -> None:
    lane = lane_of(lengths, row_size, pool_size, remainders)
    for _ in range(rows_before):
        lane.next_row()
    waiting = [piece[:2] for piece in lane.state().pending]
    delivered = [piece[:2] for _ in waiting for piece in lane.next_row()]
    assert not Counter(waiting) - Counter(delivered)


def test_a_document_longer_than_a_row_does_not_clog_the_pool_of_padded_rows() -> None:
    # Every other fits a row perfectly, and would be preferred for ever.
    lane = lane_of([*([8] * 5), *([30] * 10), *([8] * 200)], row_size=8, pool_size=10, natural=True, remainders="pad")
    assert [lane.next_row() for _ in range(20)] == [[(document, 0, 8)] for document in range(20)]
    assert lane.state().counts.padded == 0


def test_no_document_waits_longer_than_the_pool_is_deep() -> None:
    # Document 5 is longer than a row, and every other fits a row perfectly and would be preferred for ever.
    lane = lane_of([*([8] * 5), 30, *([8] * 200)], row_size=8, pool_size=10, natural=True)
    first_places = [lane.next_row()[0] for _ in range(20)]
    assert (5, 0, 8) in first_places[:10]
    assert (5, 8, 15) in first_places

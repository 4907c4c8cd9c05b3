import gc
import json
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loader_corpora import BOS, Shards, corpora, dataset_of, document_mask, document_tokens, flat

from nanochat.errors import DataError, UsageError
from nanochat.loader.batches import (
    BatchLoader,
    LoaderConfig,
    LoaderStatistics,
    MicroBatch,
    inputs_and_targets,
    merge_states,
    validation_rows,
    write_row,
)
from nanochat.loader.order import ShuffledOrder
from nanochat.loader.packing import Lane, Remainders
from nanochat.loader.token_shards import TokenDataset

NUM_LANES = 32
WORLD_SIZES = [1, 2, 4, 8, 16]
CONFIG = LoaderConfig(sequence_len=12, rows_per_batch=16, seed=3, lanes=NUM_LANES, pool_size=5)

configs = st.builds(
    LoaderConfig,
    sequence_len=st.integers(1, 30),
    rows_per_batch=st.sampled_from([16, 48, 80]),
    seed=st.integers(0, 2**63),
    lanes=st.just(NUM_LANES),
    pool_size=st.integers(1, 6),
    remainders=st.sampled_from(["keep", "drop", "pad"]),
)
mask_seeds = st.none() | st.integers(0, 2**32)


def global_batches(
    dataset: TokenDataset,
    config: LoaderConfig,
    num_steps: int,
    world_size: int = 1,
    state: dict[str, Any] | None = None,
    micro_batches: int = 1,
) -> tuple[list[MicroBatch], dict[str, Any], LoaderStatistics]:
    """Inputs and targets as all ranks together see them, the merged state, and the summed statistics."""
    loaders = [
        BatchLoader(
            dataset,
            config,
            device_batch_size=config.rows_per_batch // world_size // micro_batches,
            rank=rank,
            world_size=world_size,
            state=state,
            prefetch=2,
        )
        for rank in range(world_size)
    ]
    steps = []
    for _ in range(num_steps):
        batch_2BT = torch.empty(2, config.rows_per_batch, config.sequence_len, dtype=torch.int64)
        for rank, loader in enumerate(loaders):
            step = loader.next_step()
            assert len(step) == micro_batches
            assert all(array.dtype == torch.int64 for micro_batch in step for array in micro_batch)
            for array_BT, mine in zip(batch_2BT, zip(*step, strict=True), strict=True):
                array_BT[rank::world_size] = torch.cat(mine)
        steps.append((batch_2BT[0], batch_2BT[1]))
    merged = json.loads(json.dumps(merge_states([loader.state_dict() for loader in loaders])))
    statistics = loaders[0].statistics()
    for loader in loaders[1:]:
        statistics += loader.statistics()
    for loader in loaders:
        loader.close()
    return steps, merged, statistics


def global_steps(
    dataset: TokenDataset,
    config: LoaderConfig,
    num_steps: int,
    world_size: int = 1,
    state: dict[str, Any] | None = None,
) -> tuple[list[torch.Tensor], dict[str, Any], LoaderStatistics]:
    """As `global_batches`, of text that is neither masked nor padded: rows of T + 1."""
    batches, merged, statistics = global_batches(dataset, config, num_steps, world_size, state)
    for inputs, targets in batches:
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
    return [torch.cat([inputs, targets[:, -1:]], dim=1) for inputs, targets in batches], merged, statistics


def deliver(loader: BatchLoader, num_steps: int) -> None:
    for _ in range(num_steps):
        loader.next_step()


@pytest.fixture
def dataset() -> Iterator[TokenDataset]:
    shards = [[(i * 37) % 50 + 1 for i in range(n)] for n in (30, 0, 1, 40)]
    with dataset_of(shards) as opened:
        yield opened


@given(corpora(NUM_LANES), configs, mask_seeds, st.sampled_from(WORLD_SIZES), st.data())
@settings(max_examples=20, deadline=None)
def test_the_global_batch_depends_on_neither_world_size_nor_accumulation(
    shards: Shards, config: LoaderConfig, mask_seed: int | None, world_size: int, data: st.DataObject
) -> None:
    rows_per_rank = config.rows_per_batch // world_size
    micro_batches = data.draw(st.sampled_from([n for n in range(1, rows_per_rank + 1) if rows_per_rank % n == 0]))
    with dataset_of(shards, mask_seed=mask_seed) as dataset:
        alone, state_alone, statistics_alone = global_batches(dataset, config, 3)
        shared, state_shared, statistics_shared = global_batches(
            dataset, config, 3, world_size, micro_batches=micro_batches
        )
    for a, b in zip(alone, shared, strict=True):
        assert all(map(torch.equal, a, b))
    assert state_alone == state_shared
    assert statistics_alone == statistics_shared


@given(
    corpora(NUM_LANES),
    configs,
    mask_seeds,
    st.lists(st.tuples(st.sampled_from(WORLD_SIZES), st.integers(0, 4)), min_size=3, max_size=3),
)
@settings(max_examples=20, deadline=None)
def test_a_run_resumed_on_other_world_sizes_trains_on_the_very_same_rows(
    shards: Shards, config: LoaderConfig, mask_seed: int | None, legs: list[tuple[int, int]]
) -> None:
    with dataset_of(shards, mask_seed=mask_seed) as dataset:
        uninterrupted, final_state, final_statistics = global_batches(dataset, config, sum(steps for _, steps in legs))
        resumed: list[MicroBatch] = []
        state = None
        for world_size, num_steps in legs:
            steps, state, statistics = global_batches(dataset, config, num_steps, world_size, state)
            resumed += steps
    for a, b in zip(resumed, uninterrupted, strict=True):
        assert all(map(torch.equal, a, b))
    assert state == final_state
    assert statistics == final_statistics


@given(corpora(NUM_LANES), configs, st.sampled_from(WORLD_SIZES), st.integers(1, 8))
@settings(max_examples=20, deadline=None)
def test_every_document_is_used_exactly_once_per_epoch_over_all_ranks(
    shards: Shards, config: LoaderConfig, world_size: int, num_steps: int
) -> None:
    lengths = flat(shards)
    config = replace(config, remainders="keep")
    with dataset_of(shards) as dataset:
        steps, state, statistics = global_steps(dataset, config, num_steps, world_size)
    # Of every lane: the documents of its finished epochs, and of the running one those taken, less what is
    # pending.
    expected: Counter[int] = Counter()
    for index, lane in state["lanes"].items():
        for epoch in range(lane["epoch"] + 1):
            share = ShuffledOrder(len(lengths), config.seed, int(index), config.lanes).block(epoch, 0).tolist()
            taken = share if epoch < lane["epoch"] else share[: lane["position"]]
            for document in taken:
                expected.update(document_tokens(document, lengths[document]))
        for document, start, _ in lane["pending"]:
            expected.subtract(document_tokens(document, lengths[document])[start:])
    delivered = Counter(torch.stack(steps).flatten().tolist())
    delivered[BOS] -= statistics.added_bos
    assert +delivered == +expected
    assert statistics.tokens == num_steps * config.rows_per_batch * config.sequence_len
    assert statistics.cropped == statistics.crop_fraction == 0


@given(corpora(NUM_LANES), configs, mask_seeds, st.sampled_from(WORLD_SIZES), st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_rows_are_the_planned_documents_with_targets_only_where_the_next_token_is_trained_on(
    shards: Shards, config: LoaderConfig, mask_seed: int | None, world_size: int, num_steps: int
) -> None:
    lengths = flat(shards)
    row_size = config.sequence_len + 1
    with dataset_of(shards, mask_seed=mask_seed) as dataset:
        batches, _, statistics = global_batches(dataset, config, num_steps, world_size)
        lanes = [
            Lane(
                ShuffledOrder(len(lengths), config.seed, lane, config.lanes),
                dataset.lengths_of,
                row_size=row_size,
                pool_size=config.pool_size,
                remainders=config.remainders,
            )
            for lane in range(config.lanes)
        ]
        plans = [lanes[row % config.lanes].next_row() for row in range(num_steps * config.rows_per_batch)]
    num_padded = 0
    rows = (pair for batch in batches for pair in zip(*batch, strict=True))
    for plan, (inputs, targets) in zip(plans, rows, strict=True):
        row: list[tuple[int, bool]] = []
        for document, start, stop in plan:
            length = lengths[document]
            mask = [1] * length if mask_seed is None else document_mask(document, length, mask_seed)
            tokens = list(zip(document_tokens(document, length), map(bool, mask), strict=True))
            row += [(BOS, mask_seed is None)] * (start > 0) + tokens[start:stop]
        num_padded += row_size - len(row)
        row += [(BOS, False)] * (row_size - len(row))
        assert inputs.tolist() == [token for token, _ in row[:-1]]
        assert targets.tolist() == [token if said else -1 for token, said in row[1:]]
    assert statistics.padded == num_padded
    assert statistics.padded_fraction == num_padded / (len(plans) * row_size)


@given(
    corpora(NUM_LANES), configs, st.sampled_from(["keep", "pad"]), st.integers(0, 2**32), st.sampled_from(WORLD_SIZES)
)
@settings(max_examples=20, deadline=None)
def test_every_trained_token_is_a_target_exactly_once_per_epoch_over_all_ranks(
    shards: Shards, config: LoaderConfig, remainders: Remainders, mask_seed: int, world_size: int
) -> None:
    lengths = flat(shards)
    config = replace(config, remainders=remainders)
    # What padded rows leave of a document that is longer than one.
    longest = config.sequence_len + 1 if remainders == "pad" else max(lengths)
    with dataset_of(shards, mask_seed=mask_seed) as dataset:
        batches, state, _ = global_batches(dataset, config, 6, world_size)

    def trained(document: int, start: int = 0) -> list[int]:
        """Without the first token, which is no target at the beginning of a row."""
        length = lengths[document]
        pairs = zip(document_tokens(document, length), document_mask(document, length, mask_seed), strict=True)
        return [token for token, said in list(pairs)[max(start, 1) : longest] if said]

    expected: Counter[int] = Counter()
    for index, lane in state["lanes"].items():
        for epoch in range(lane["epoch"] + 1):
            share = ShuffledOrder(len(lengths), config.seed, int(index), config.lanes).block(epoch, 0).tolist()
            for document in share if epoch < lane["epoch"] else share[: lane["position"]]:
                expected.update(trained(document))
        for document, start, _ in lane["pending"]:
            expected.subtract(trained(document, start))
    targets = Counter(token for _, targets in batches for token in targets.flatten().tolist())
    del targets[-1], targets[BOS]
    assert targets == +expected


def test_epochs_are_counted_over_all_ranks(dataset: TokenDataset) -> None:
    _, state, statistics = global_steps(dataset, CONFIG, 80, world_size=4)
    lowest = min(lane["epoch"] for lane in state["lanes"].values())
    highest = max(lane["epoch"] for lane in state["lanes"].values())
    assert 2 <= lowest <= statistics.epochs <= highest + 1


def test_cropping_is_counted_when_remainders_are_dropped(dataset: TokenDataset) -> None:
    _, _, statistics = global_steps(dataset, replace(CONFIG, remainders="drop"), 10)
    assert statistics.added_bos == 0
    assert statistics.cropped > 0
    assert statistics.crop_fraction == statistics.cropped / (statistics.packed + statistics.cropped)


def test_the_state_is_that_of_the_last_step_handed_out_however_much_was_prefetched(
    dataset: TokenDataset,
) -> None:
    with BatchLoader(dataset, CONFIG, device_batch_size=4, prefetch=8) as eager:
        eager.next_step()
        deadline = time.monotonic() + 10
        while eager._producer.ready.qsize() < 7 and time.monotonic() < deadline:
            time.sleep(0.001)
        state = eager.state_dict()
    with BatchLoader(dataset, CONFIG, device_batch_size=4, prefetch=1) as lazy:
        lazy.next_step()
        assert lazy.state_dict() == state


def test_a_batch_once_handed_out_never_changes(dataset: TokenDataset) -> None:
    with BatchLoader(dataset, CONFIG, device_batch_size=8, prefetch=2) as loader:
        steps = [loader.next_step() for _ in range(12)]
        copies = [[(x.clone(), y.clone()) for x, y in step] for step in steps]
        for _ in range(12):
            loader.next_step()
    for step, copy in zip(steps, copies, strict=True):
        for (x, y), (x_then, y_then) in zip(step, copy, strict=True):
            assert torch.equal(x, x_then)
            assert torch.equal(y, y_then)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_that_lags_behind_gets_the_same_batches(dataset: TokenDataset) -> None:
    expected, _, _ = global_steps(dataset, CONFIG, 50)
    busy = torch.randn(4096, 4096, device="cuda")
    with BatchLoader(dataset, CONFIG, device_batch_size=16, device="cuda", prefetch=2) as loader:
        for rows in expected:
            for _ in range(5):
                busy = busy @ busy / 64
            [(inputs, targets)] = loader.next_step()
            assert torch.equal(inputs.cpu(), rows[:, :-1])
            assert torch.equal(targets.cpu(), rows[:, 1:])


@pytest.mark.parametrize("how", ["close", "garbage"])
def test_no_thread_outlives_its_loader(dataset: TokenDataset, how: str) -> None:
    before = threading.active_count()
    loader = BatchLoader(dataset, CONFIG, device_batch_size=4)
    loader.next_step()
    assert threading.active_count() == before + 1
    if how == "close":
        loader.close()
        with pytest.raises(RuntimeError, match="closed"):
            loader.next_step()
    gone = weakref.ref(loader)
    del loader
    gc.collect()
    assert gone() is None
    assert threading.active_count() == before


def test_an_error_in_the_background_reaches_the_caller_and_stays(dataset: TokenDataset) -> None:
    # A shard is taken away below the data set: the thread, not the constructor, finds out.
    broken = replace(dataset, _shards=dataset._shards[:-1])
    before = threading.active_count()
    with BatchLoader(broken, CONFIG, device_batch_size=4) as loader:
        for _ in range(2):
            with pytest.raises(IndexError):
                deliver(loader, num_steps=100)
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("world_size", "device_batch_size", "message"),
    [
        (3, 4, "use one of 1, 2, 4, 8, 16 ranks"),
        (32, 4, "use one of 1, 2, 4, 8, 16 ranks"),
        (2, 3, "use a --device-batch-size of 1, 2, 4, 8"),
        (2, 16, "use a --device-batch-size of 1, 2, 4, 8"),
        (2, 0, "use a --device-batch-size of 1, 2, 4, 8"),
    ],
)
def test_numbers_that_do_not_divide_are_refused_with_those_that_do(
    dataset: TokenDataset, world_size: int, device_batch_size: int, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        BatchLoader(dataset, CONFIG, device_batch_size=device_batch_size, world_size=world_size)


def test_fewer_documents_than_lanes_are_refused_before_the_first_step() -> None:
    with dataset_of([[5] * 15]) as dataset, pytest.raises(DataError, match="15 train documents for 32 lanes"):
        BatchLoader(dataset, CONFIG, device_batch_size=4)


@pytest.mark.parametrize("field", ["sequence_len", "rows_per_batch", "lanes", "pool_size"])
def test_settings_below_one_are_refused(field: str) -> None:
    with pytest.raises(UsageError, match=field):
        replace(CONFIG, **{field: 0})


@pytest.mark.parametrize(
    "change",
    [
        {"sequence_len": 13},
        {"rows_per_batch": 32},
        {"seed": 4},
        {"lanes": 8},
        {"pool_size": 6},
        {"remainders": "drop"},
    ],
)
def test_resuming_with_another_setting_is_refused_with_its_name(dataset: TokenDataset, change: dict[str, Any]) -> None:
    _, state, _ = global_steps(dataset, CONFIG, 1)
    [name] = change
    with pytest.raises(UsageError, match=f"{name} .* → {change[name]}"):
        BatchLoader(dataset, replace(CONFIG, **change), device_batch_size=4, state=state)


def test_resuming_on_other_data_is_refused(dataset: TokenDataset) -> None:
    _, state, _ = global_steps(dataset, CONFIG, 1)
    with dataset_of([[9] * 71]) as other, pytest.raises(DataError, match="not those the run began with"):
        BatchLoader(other, CONFIG, device_batch_size=4, state=state)


def test_a_damaged_or_partial_state_is_refused(dataset: TokenDataset) -> None:
    with BatchLoader(dataset, CONFIG, device_batch_size=4, rank=1, world_size=2) as loader:
        partial = loader.state_dict()
    for state in (partial, {}, {**partial, "lanes": {"0": "rubbish"}}, {**partial, "version": 99}):
        with pytest.raises(DataError):
            BatchLoader(dataset, CONFIG, device_batch_size=4, rank=0, world_size=2, state=state)


def test_states_of_different_steps_or_missing_ranks_do_not_merge(dataset: TokenDataset) -> None:
    with (
        BatchLoader(dataset, CONFIG, device_batch_size=4, rank=0, world_size=2) as first,
        BatchLoader(dataset, CONFIG, device_batch_size=4, rank=1, world_size=2) as second,
    ):
        with pytest.raises(ValueError, match="16 of 32 lanes"):
            merge_states([first.state_dict()])
        first.next_step()
        with pytest.raises(ValueError, match="differ in step"):
            merge_states([first.state_dict(), second.state_dict()])


@given(corpora(1), st.integers(1, 30))
@settings(max_examples=40, deadline=None)
def test_validation_covers_every_document_once_and_only_the_last_row_may_be_missing(
    shards: Shards, sequence_len: int
) -> None:
    lengths = flat(shards)
    with dataset_of(shards, "val") as dataset:
        try:
            rows = validation_rows(dataset, sequence_len)
        except DataError:
            assert sum(lengths) < 2 * (sequence_len + 1)
            return
        assert np.array_equal(rows, validation_rows(dataset, sequence_len))
        assert np.array_equal(rows[:2], validation_rows(dataset, sequence_len, max_rows=2))
    assert rows.dtype == np.int32
    assert rows.shape[1] == sequence_len + 1
    assert (rows[:, 0] == BOS).all()
    available = Counter(token for d, n in enumerate(lengths) for token in document_tokens(d, n)[1:])
    used = Counter(rows[rows != BOS].tolist())
    assert used <= available
    assert (available - used).total() <= sequence_len


@given(corpora(1), st.integers(1, 30), st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_padded_validation_holds_every_document_once_and_whole(
    shards: Shards, sequence_len: int, mask_seed: int
) -> None:
    lengths = flat(shards)
    with dataset_of(shards, "val", mask_seed) as dataset:
        rows = validation_rows(dataset, sequence_len, remainders="pad")
        assert np.array_equal(rows, validation_rows(dataset, sequence_len, remainders="pad"))
        assert np.array_equal(rows[:2], validation_rows(dataset, sequence_len, max_rows=2, remainders="pad"))
    tokens = np.where(rows < 0, ~rows, rows)
    assert (tokens[:, 0] == BOS).all()
    expected: Counter[tuple[int, ...]] = Counter()
    num_trained = 0
    for document, length in enumerate(lengths):
        expected[tuple(document_tokens(document, length)[1 : sequence_len + 1])] += 1
        num_trained += sum(document_mask(document, length, mask_seed)[: sequence_len + 1])
    found: Counter[tuple[int, ...]] = Counter()
    for row in tokens.tolist():
        begins = [place for place, token in enumerate(row) if token == BOS]
        found.update(tuple(row[begin + 1 : end]) for begin, end in zip(begins, [*begins[1:], len(row)], strict=True))
    # Documents of BOS alone look like padding.
    del expected[()], found[()]
    assert found == expected
    assert (rows >= 0).sum() == num_trained


def test_less_than_a_row_of_validation_conversations_is_a_padded_row() -> None:
    with dataset_of([[5, 6]], "val") as dataset:
        [row] = validation_rows(dataset, 64, remainders="pad").tolist()
    assert row == [*document_tokens(0, 5), *document_tokens(1, 6), *[-1 - BOS] * 54]


def test_too_little_validation_text_is_refused() -> None:
    with dataset_of([[5, 6]], "val") as dataset, pytest.raises(DataError, match="11 val tokens"):
        validation_rows(dataset, 64)


def test_a_planned_row_is_copied_token_by_token_with_bos_before_a_tail() -> None:
    with dataset_of([[4], [], [6]]) as dataset:
        row = np.zeros(8, dtype=np.int32)
        write_row(dataset, [(0, 0, 4), (1, 3, 6)], row)
    assert row.tolist() == [*document_tokens(0, 4), BOS, *document_tokens(1, 6)[3:]]


def test_what_is_not_trained_on_stands_as_its_complement_and_what_is_empty_as_that_of_bos() -> None:
    masks = [document_mask(0, 4, seed=1), document_mask(1, 6, seed=1)[3:]]
    assert all(0 < sum(mask) < len(mask) for mask in masks)
    with dataset_of([[4], [], [6]], mask_seed=1) as dataset:
        row = np.zeros(10, dtype=np.int32)
        write_row(dataset, [(0, 0, 4), (1, 3, 6)], row)
    tokens = [*document_tokens(0, 4), BOS, *document_tokens(1, 6)[3:], BOS, BOS]
    trained = [*masks[0], 0, *masks[1], 0, 0]
    assert row.tolist() == [token if said else -1 - token for token, said in zip(tokens, trained, strict=True)]


def test_a_row_is_read_whole_and_scored_where_it_is_trained_on() -> None:
    rows = torch.tensor([[~BOS, 5, ~7, 0, ~0, BOS, ~BOS]], dtype=torch.int32)
    inputs, targets = inputs_and_targets(rows)
    assert inputs.tolist() == [[BOS, 5, 7, 0, 0, BOS]]
    assert targets.tolist() == [[5, -1, 0, -1, BOS, -1]]
    assert inputs.dtype == targets.dtype == torch.int64

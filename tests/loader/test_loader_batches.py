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
from loader_corpora import BOS, Shards, corpora, dataset_of, document_tokens, flat

from nanochat.errors import DataError, UsageError
from nanochat.loader.batches import (
    BatchLoader,
    LoaderConfig,
    LoaderStatistics,
    merge_states,
    validation_rows,
    write_row,
)
from nanochat.loader.order import ShuffledOrder
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
    remainders=st.sampled_from(["keep", "drop"]),
)


def global_steps(
    dataset: TokenDataset,
    config: LoaderConfig,
    num_steps: int,
    world_size: int = 1,
    state: dict[str, Any] | None = None,
    micro_batches: int = 1,
) -> tuple[list[torch.Tensor], dict[str, Any], LoaderStatistics]:
    """Steps as all ranks together see them (rows of T + 1), the merged state, and the summed statistics."""
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
        rows = torch.empty(config.rows_per_batch, config.sequence_len + 1, dtype=torch.int64)
        for rank, loader in enumerate(loaders):
            step = loader.next_step()
            assert len(step) == micro_batches
            inputs = torch.cat([inputs for inputs, _ in step])
            targets = torch.cat([targets for _, targets in step])
            assert inputs.dtype == targets.dtype == torch.int64
            assert torch.equal(inputs[:, 1:], targets[:, :-1])
            rows[rank::world_size] = torch.cat([inputs, targets[:, -1:]], dim=1)
        steps.append(rows)
    merged = json.loads(json.dumps(merge_states([loader.state_dict() for loader in loaders])))
    statistics = loaders[0].statistics()
    for loader in loaders[1:]:
        statistics += loader.statistics()
    for loader in loaders:
        loader.close()
    return steps, merged, statistics


def deliver(loader: BatchLoader, num_steps: int) -> None:
    for _ in range(num_steps):
        loader.next_step()


@pytest.fixture
def dataset() -> Iterator[TokenDataset]:
    shards = [[(i * 37) % 50 + 1 for i in range(n)] for n in (30, 0, 1, 40)]
    with dataset_of(shards) as opened:
        yield opened


@given(corpora(NUM_LANES), configs, st.sampled_from(WORLD_SIZES), st.data())
@settings(max_examples=20, deadline=None)
def test_the_global_batch_depends_on_neither_world_size_nor_accumulation(
    shards: Shards, config: LoaderConfig, world_size: int, data: st.DataObject
) -> None:
    rows_per_rank = config.rows_per_batch // world_size
    micro_batches = data.draw(st.sampled_from([n for n in range(1, rows_per_rank + 1) if rows_per_rank % n == 0]))
    with dataset_of(shards) as dataset:
        alone, state_alone, statistics_alone = global_steps(dataset, config, 3)
        shared, state_shared, statistics_shared = global_steps(
            dataset, config, 3, world_size, micro_batches=micro_batches
        )
    for a, b in zip(alone, shared, strict=True):
        assert torch.equal(a, b)
    assert state_alone == state_shared
    assert statistics_alone == statistics_shared


@given(
    corpora(NUM_LANES),
    configs,
    st.lists(st.tuples(st.sampled_from(WORLD_SIZES), st.integers(0, 4)), min_size=3, max_size=3),
)
@settings(max_examples=20, deadline=None)
def test_a_run_resumed_on_other_world_sizes_trains_on_the_very_same_rows(
    shards: Shards, config: LoaderConfig, legs: list[tuple[int, int]]
) -> None:
    with dataset_of(shards) as dataset:
        uninterrupted, final_state, final_statistics = global_steps(dataset, config, sum(steps for _, steps in legs))
        resumed: list[torch.Tensor] = []
        state = None
        for world_size, num_steps in legs:
            steps, state, statistics = global_steps(dataset, config, num_steps, world_size, state)
            resumed += steps
    assert len(resumed) == len(uninterrupted)
    assert all(map(torch.equal, resumed, uninterrupted))
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
    assert rows.dtype == np.uint16
    assert rows.shape[1] == sequence_len + 1
    assert (rows[:, 0] == BOS).all()
    available = Counter(token for d, n in enumerate(lengths) for token in document_tokens(d, n)[1:])
    used = Counter(rows[rows != BOS].tolist())
    assert used <= available
    assert (available - used).total() <= sequence_len


def test_too_little_validation_text_is_refused() -> None:
    with dataset_of([[5, 6]], "val") as dataset, pytest.raises(DataError, match="11 val tokens"):
        validation_rows(dataset, 64)


def test_a_planned_row_is_copied_token_by_token_with_bos_before_a_tail() -> None:
    with dataset_of([[4], [], [6]]) as dataset:
        row = np.zeros(8, dtype=np.int32)
        write_row(dataset, [(0, 0, 4), (1, 3, 6)], row)
    assert row.tolist() == [*document_tokens(0, 4), BOS, *document_tokens(1, 6)[3:]]

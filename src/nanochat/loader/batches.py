"""Batches on the device: the same global batch for any number of ranks, resumable to the row.

A run's rows are numbered 0, 1, 2, … and row i comes from lane i mod V. Step k trains on rows [k·R, (k+1)·R),
and rank r of W delivers those with i ≡ r (mod W). Nothing else decides what is trained on: neither the world
size, nor the micro-batch, nor how often the run was stopped and went on.

A background thread plans rows, copies tokens and stays a few steps ahead. What was prefetched but not handed
out is not part of the state: every prepared step carries the lanes' state as of its own end.
"""

import threading
import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from math import gcd
from queue import SimpleQueue
from typing import Any, Self, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from nanochat.errors import DataError, UsageError
from nanochat.loader.order import NaturalOrder, ShuffledOrder
from nanochat.loader.packing import Lane, LaneState, Remainders
from nanochat.loader.token_shards import TOKENIZE_COMMAND, Piece, TokenDataset

STATE_VERSION = 1
VALIDATION_POOL_SIZE = 256

# (inputs_BT, targets_BT), both int64 on the training device; a target of −1 is not trained on.
MicroBatch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class LoaderConfig:
    """What, with the data, determines every row of a run.

    Attributes:
        sequence_len: T, the inputs per row.
        rows_per_batch: R, the rows of one optimizer step over all ranks.
        seed: of the document order.
        lanes: V, independent streams of rows. Every world size that divides it sees the same batches.
        pool_size: documents a lane chooses from when it packs.
        remainders: whether the tail of a document split to complete a row is trained on later or dropped, or rows
            are padded and no document is split.
    """

    sequence_len: int
    rows_per_batch: int
    seed: int
    lanes: int = 64
    pool_size: int = 256
    remainders: Remainders = "keep"

    def __post_init__(self) -> None:
        for name in ("sequence_len", "rows_per_batch", "lanes", "pool_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}", "it must be at least 1")
        if self.remainders not in get_args(Remainders):
            raise UsageError(f"remainders {self.remainders!r} is unknown", f"use {', '.join(get_args(Remainders))}")


@dataclass(frozen=True)
class LoaderStatistics:
    """What has been delivered since the run began, by the lanes of one rank or, added up, of several.

    Attributes:
        tokens: trained tokens, T per row.
        packed: places of rows, T + 1 per row, added BOS and padding included.
        cropped: document tokens thrown away.
        added_bos: BOS tokens put before the tails of split documents.
        padded: places left empty.
        documents: documents begun, repeated ones counted again.
        num_documents: documents in the data set.
    """

    tokens: int
    packed: int
    cropped: int
    added_bos: int
    padded: int
    documents: int
    num_documents: int

    def __add__(self, other: "LoaderStatistics") -> "LoaderStatistics":
        """The statistics of two ranks together."""
        counts = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return LoaderStatistics(**counts | {"num_documents": self.num_documents})

    @property
    def crop_fraction(self) -> float:
        """The share of document tokens that was thrown away, 0 to 1."""
        consumed = self.packed - self.added_bos - self.padded + self.cropped
        return self.cropped / consumed if consumed else 0.0

    @property
    def padded_fraction(self) -> float:
        """The share of places in rows that was left empty, 0 to 1."""
        return self.padded / self.packed if self.packed else 0.0

    @property
    def epochs(self) -> float:
        """Passes over the data: documents begun per document there is. Add up all ranks before reading it."""
        return self.documents / self.num_documents


class BatchLoader:
    """Delivers this rank's micro-batches, step by step, without end.

    Args:
        dataset: the token shards.
        config: what determines the rows.
        device_batch_size: rows per micro-batch on this device.
        rank: which of the ranks this is.
        world_size: how many ranks share the batch.
        device: where the batches go.
        state: go on from this state, of `state_dict` or, on more than one rank, `merge_states`.
        prefetch: steps to prepare ahead, at least 1.

    Raises:
        UsageError: the numbers do not divide each other, or `state` is of a run with other settings.
        DataError: there are fewer documents than lanes, or `state` is of other data or incomplete.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        config: LoaderConfig,
        *,
        device_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        state: dict[str, Any] | None = None,
        prefetch: int = 4,
    ) -> None:
        _check_division(config, device_batch_size, rank, world_size)
        if prefetch < 1:
            raise UsageError(f"prefetch is {prefetch}", "it must be at least 1")
        if dataset.num_documents < config.lanes:
            raise DataError(
                f"{dataset.folder} holds {dataset.num_documents} {dataset.split} documents for {config.lanes} lanes",
                f"use more data, or --lanes {dataset.num_documents} or less",
            )
        lane_indices = range(rank, config.lanes, world_size)
        self._dataset = dataset
        self._config = config
        self._device_batch_size = device_batch_size
        self._device = torch.device(device)
        self._lane_indices = lane_indices
        self._step, self._states = _restore(state, dataset, config, lane_indices)
        self._failure: BaseException | None = None

        self._producer = _Producer(dataset, config, rank, world_size, self._step, self._states, self._device, prefetch)
        thread = threading.Thread(target=self._producer.run, name="batch loader", daemon=True)
        # The thread knows the producer, not the loader: a forgotten loader is collected and its thread ends.
        self._close = weakref.finalize(self, _stop, self._producer, thread)
        thread.start()

    def next_step(self) -> list[MicroBatch]:
        """The micro-batches of the next optimizer step: (inputs_BT, targets_BT), int64, on the device.

        Raises:
            RuntimeError: the loader is closed.
            Exception: whatever stopped the background thread, from the step on that it could not prepare.
        """
        if self._failure is None and not self._close.alive:
            raise RuntimeError("this batch loader is closed")
        ready = self._failure or self._producer.ready.get()
        if isinstance(ready, BaseException):
            self._failure = ready
            self.close()
            raise ready
        slot, self._states = ready
        self._step += 1
        on_gpu = self._device.type == "cuda"
        rows = slot.rows.to(self._device, non_blocking=on_gpu)
        micro_batches = [inputs_and_targets(rows_BT1) for rows_BT1 in torch.split(rows, self._device_batch_size)]
        if on_gpu:
            # The copy is only queued. The slot may be written again when the GPU has passed this point.
            slot.copied = torch.cuda.current_stream(self._device).record_event()
        self._producer.free.put(slot)
        return micro_batches

    def state_dict(self) -> dict[str, Any]:
        """Where this rank's lanes stand after the last step handed out, as JSON-able data.

        Lists of hundreds of pending documents per lane: tens of kilobytes per rank, a few hundred in all.
        """
        return {
            "version": STATE_VERSION,
            "step": self._step,
            "dataset": self._dataset.fingerprint,
            "config": asdict(self._config),
            "lanes": {str(lane): state.to_json() for lane, state in zip(self._lane_indices, self._states)},
        }

    def statistics(self) -> LoaderStatistics:
        """What this rank has delivered since the run began, resumes included. Ranks add up with `+`."""
        counts = [state.counts for state in self._states]
        rows = sum(count.rows for count in counts)
        return LoaderStatistics(
            tokens=rows * self._config.sequence_len,
            packed=rows * (self._config.sequence_len + 1),
            cropped=sum(count.cropped for count in counts),
            added_bos=sum(count.added_bos for count in counts),
            padded=sum(count.padded for count in counts),
            documents=sum(count.documents for count in counts),
            num_documents=self._dataset.num_documents,
        )

    def close(self) -> None:
        """End the background thread. Also happens when the loader is collected or the process exits."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Combine the states of all ranks into the one a checkpoint stores and any world size resumes from.

    Raises:
        ValueError: the states are not of the same step of one run, or do not make up all its lanes.
    """
    first = states[0]
    for state in states:
        different = [key for key in ("version", "step", "dataset", "config") if state[key] != first[key]]
        if different:
            raise ValueError(f"the ranks' loader states differ in {', '.join(different)}")
    lanes = {lane: value for state in states for lane, value in state["lanes"].items()}
    if len(lanes) != first["config"]["lanes"]:
        raise ValueError(f"the ranks' loader states hold {len(lanes)} of {first['config']['lanes']} lanes")
    return {**first, "lanes": {lane: lanes[lane] for lane in sorted(lanes, key=int)}}


def validation_rows(
    dataset: TokenDataset, sequence_len: int, max_rows: int | None = None, remainders: Remainders = "keep"
) -> NDArray[np.int32]:
    """The fixed validation set: the first rows of one pass in natural order, packed as in training.

    A function of data and sequence length alone, so that every run, rank and world size measures the same.
    The last row is left out if the documents do not fill it, unless rows are padded.

    Args:
        max_rows: at most so many rows; by default all.
        remainders: as in training.

    Returns:
        Rows of shape (N, T + 1), N at least 1, as `write_row` makes them.

    Raises:
        DataError: the documents do not fill a single row, and rows are not padded.
    """
    row_size = sequence_len + 1
    lane = Lane(
        NaturalOrder(dataset.num_documents),
        dataset.lengths_of,
        row_size=row_size,
        pool_size=VALIDATION_POOL_SIZE,
        remainders=remainders,
    )
    plans: list[list[Piece]] = []
    while max_rows is None or len(plans) < max_rows:
        num_left = dataset.num_documents - lane.state().counts.documents
        plan = lane.next_row()
        if lane.state().epoch > 0:
            # The pass ended within this row, or before it. Padded rows hold whole documents, one a piece.
            if remainders == "pad" and num_left:
                plans.append(plan[:num_left])
            break
        plans.append(plan)
    if not plans:
        raise DataError(
            f"{dataset.folder} holds {dataset.num_tokens} {dataset.split} tokens, less than one row of {row_size}",
            "use more validation text or a smaller --sequence-len",
        )
    rows = np.empty((len(plans), row_size), dtype=np.int32)
    for row, plan in zip(rows, plans):
        write_row(dataset, plan, row)
    return rows


def write_row(dataset: TokenDataset, plan: Sequence[Piece], row: NDArray[np.int32]) -> None:
    """Copy the tokens of a planned row into `row`.

    A token that is not trained on stands as its complement, −1 − token, which no token is. So one array holds both
    what the model reads and what it is trained to say, and crosses to the device as one. What the plan leaves empty
    is BOS, not trained on.
    """
    pieces: list[NDArray[Any]] = dataset.pieces(plan)
    masks: list[NDArray[Any]] = dataset.trained_pieces(plan) if dataset.is_masked else []
    # From the back, as each insertion moves what comes after it.
    for place in range(len(plan) - 1, -1, -1):
        if plan[place][1] > 0:
            pieces.insert(place, np.array([dataset.bos_id], dtype=np.uint16))
            if masks:
                masks.insert(place, np.zeros(1, dtype=np.uint8))
    filled = row[: sum(map(len, pieces))]
    np.concatenate(pieces, out=filled)
    if masks:
        np.invert(filled, out=filled, where=np.concatenate(masks) == 0)
    row[len(filled) :] = ~dataset.bos_id


def inputs_and_targets(rows_BT1: torch.Tensor) -> MicroBatch:
    """Rows of `write_row` as what the model reads and what it is trained to say, both int64 (B, T)."""
    inputs_BT, targets_BT = rows_BT1[:, :-1], rows_BT1[:, 1:]
    # The shift gives −1 where a token stands as its complement, and 0 elsewhere. Widened last: half the time.
    return (inputs_BT ^ (inputs_BT >> 31)).to(torch.int64), targets_BT.clamp(min=-1).to(torch.int64)


@dataclass
class _Slot:
    """Memory for the rows of one step, written by the thread, read by the consumer; pinned if for a GPU."""

    rows: torch.Tensor
    copied: torch.cuda.Event | None = None


class _Producer:
    """The background half: takes free slots, fills them with the rank's next rows, hands them over."""

    def __init__(
        self,
        dataset: TokenDataset,
        config: LoaderConfig,
        rank: int,
        world_size: int,
        step: int,
        states: Sequence[LaneState],
        device: torch.device,
        prefetch: int,
    ) -> None:
        self.free: SimpleQueue[_Slot | None] = SimpleQueue()
        self.ready: SimpleQueue[tuple[_Slot, tuple[LaneState, ...]] | BaseException] = SimpleQueue()
        self.stopping = threading.Event()
        self._dataset = dataset
        self._states = list(states)
        self._rows_per_step = config.rows_per_batch // world_size
        self._next_row = step * self._rows_per_step
        self._lanes = [
            Lane(
                ShuffledOrder(dataset.num_documents, config.seed, index, config.lanes),
                dataset.lengths_of,
                row_size=config.sequence_len + 1,
                pool_size=config.pool_size,
                remainders=config.remainders,
                state=state,
            )
            for index, state in zip(range(rank, config.lanes, world_size), states)
        ]
        shape = (self._rows_per_step, config.sequence_len + 1)
        for _ in range(prefetch):
            # int32, not uint16: half the bytes over the bus are not worth a type with few kernels.
            rows = torch.empty(shape, dtype=torch.int32, pin_memory=device.type == "cuda")
            self.free.put(_Slot(rows))

    def run(self) -> None:
        """Prepare steps until told to stop. An error is handed over in place of the step it prevented."""
        try:
            while (slot := self.free.get()) is not None and not self.stopping.is_set():
                if slot.copied is not None:
                    slot.copied.synchronize()
                self.ready.put((slot, self._fill(slot)))
        except BaseException as error:  # The consumer would wait for ever for a thread that died silently.
            self.ready.put(error)

    def _fill(self, slot: _Slot) -> tuple[LaneState, ...]:
        touched = set()
        for row in slot.rows.numpy():
            # Row j of the rank is row r + j·W of the run, so of lane (r + j·W) mod V: its own lane j mod V/W.
            lane = self._next_row % len(self._lanes)
            write_row(self._dataset, self._lanes[lane].next_row(), row)
            touched.add(lane)
            self._next_row += 1
        for lane in touched:
            self._states[lane] = self._lanes[lane].state()
        return tuple(self._states)


def _stop(producer: _Producer, thread: threading.Thread) -> None:
    producer.stopping.set()
    producer.free.put(None)
    # The garbage collector may run this in the very thread it ends.
    if thread is not threading.current_thread():
        thread.join()


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _check_division(config: LoaderConfig, device_batch_size: int, rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise UsageError(f"rank {rank} of {world_size} does not exist")
    lanes, rows = config.lanes, config.rows_per_batch
    if lanes % world_size or rows % world_size:
        valid = ", ".join(map(str, _divisors(gcd(lanes, rows))))
        raise UsageError(
            f"{world_size} ranks cannot share {lanes} lanes and batches of {rows} rows evenly",
            f"use one of {valid} ranks, or a number of lanes and rows that {world_size} divides",
        )
    rows_per_rank = rows // world_size
    if device_batch_size < 1 or rows_per_rank % device_batch_size:
        valid = ", ".join(map(str, _divisors(rows_per_rank)))
        raise UsageError(
            f"{rows_per_rank} rows per rank and step cannot be cut into micro-batches of {device_batch_size}",
            f"use a --device-batch-size of {valid}",
        )


def _restore(
    state: dict[str, Any] | None, dataset: TokenDataset, config: LoaderConfig, lane_indices: range
) -> tuple[int, tuple[LaneState, ...]]:
    """The step and the lanes' states to go on from, after checking that they belong to this run."""
    if state is None:
        return 0, tuple(LaneState() for _ in lane_indices)
    try:
        if state["version"] != STATE_VERSION:
            raise DataError(f"the loader state has version {state['version']}, this code reads {STATE_VERSION}")
        if state["dataset"] != dataset.fingerprint:
            raise DataError(
                f"the tokens in {dataset.folder} are not those the run began with"
                f" ({dataset.fingerprint}, was {state['dataset']})",
                f"restore them ({TOKENIZE_COMMAND}, same corpus and tokenizer), or begin a new run",
            )
        now = asdict(config)
        changed = [
            f"{name} {state['config'][name]} → {now[name]}" for name in now if state["config"][name] != now[name]
        ]
        if changed:
            raise UsageError(
                f"the run began with other settings: {', '.join(changed)}",
                "resume with the old ones or begin a new run (ranks and --device-batch-size may change)",
            )
        lanes = tuple(LaneState.from_json(state["lanes"][str(index)]) for index in lane_indices)
        return int(state["step"]), lanes
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"the loader state is damaged or lacks lanes of other ranks ({error!r})") from None

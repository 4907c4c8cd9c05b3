"""The training loop: one for every stage, from the first step to the last checkpoint.

What differs between base, mid, SFT and RL is handed in as a `Stage`: model, optimizer, data, schedule, evaluation,
samples. What is the same is here: gradient accumulation, the guard against non-finite steps, metrics, checkpoints
before evaluations, and a stop that all ranks agree on.

A step is one optimizer update on one global batch. Step k means "k updates done"; its metrics describe the update
that led to it.

A GPU computes what the host has queued. A host that looked at each step's loss before it queues the next one would
leave it idle in between, so the results are read one step late, except where something is done with the weights.
"""

import gc
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nanochat.checkpoint.folders import checkpoint_folder
from nanochat.checkpoint.store import CheckpointNotSavedError, save_checkpoint
from nanochat.errors import NanochatError, StoppedForRequeueError, StoppedWithMainError
from nanochat.loader.batches import BatchLoader, merge_states
from nanochat.model.gpt import GPT
from nanochat.model.loss import IGNORED_TARGET
from nanochat.optim.optimizer import ShardedOptimizer
from nanochat.optim.schedules import StepSchedule
from nanochat.runtime import (
    Runtime,
    barrier,
    from_main,
    gather_from_ranks,
    made_progress,
    peak_memory_bytes,
    random_state,
    restore_random_state,
    run_on_main,
    sum_over_ranks,
)
from nanochat.tracking import keys
from nanochat.tracking.console import Console, format_count, format_fields, format_seconds
from nanochat.tracking.metrics import MetricsLog, read
from nanochat.tracking.peak_flops import peak_flops
from nanochat.tracking.tensorboard import EventFiles
from nanochat.tracking.wandb_run import WandbRun
from nanochat.training.heartbeat import Heartbeat
from nanochat.training.stopping import StopRequest
from nanochat.workspace import Stage as StageName

# A single overflow is skipped and counted; this many in a row mean that the run has diverged.
MOST_SKIPS_IN_A_ROW = 10
STEPS_TO_ESTIMATE_FROM = 20
SMOOTHING = 0.9

# Steps that may be queued when the results of one are read. On a CPU they are there as soon as it is queued.
STEPS_AHEAD = {"cpu": 0, "cuda": 1}


@dataclass(frozen=True)
class Cadence:
    """How long the loop runs and how often it does what; counts of steps, 0 for "at the end only"."""

    num_steps: int
    log_every: int
    eval_every: int
    sample_every: int
    save_every: int
    keep_checkpoints: int

    def due(self, every: int, step: int) -> bool:
        """Whether something is due after this many steps; at the end everything is."""
        return step == self.num_steps or (every > 0 and step % every == 0)

    def uses_weights(self, step: int) -> bool:
        """Whether something is done with the weights after this many steps."""
        return any(self.due(every, step) for every in (self.eval_every, self.sample_every, self.save_every))


@dataclass
class Progress:
    """What is carried from step to step and through checkpoints, beside weights and data position."""

    step: int = 0
    smoothed_loss: float = 0.0
    seconds: float = 0.0
    skipped_steps: int = 0


@dataclass(frozen=True)
class Stage:
    """Everything that makes one stage different from another.

    Attributes:
        name: base, mid, sft or rl.
        model: the network, on its device.
        forward: the same network as it is called in training: compiled, or just itself.
        optimizer: holds every parameter of the model.
        loader: this rank's batches.
        schedule: learning rate and the like of a step, counted from 0.
        evaluate: metrics of the model as it stands, `epoch/*`; called on all ranks, must contain `BPB`.
        sample: example texts; called on rank 0.
        tokens_per_step: tokens of a global batch.
        tokens_per_epoch: tokens of one pass over the data.
        flops_per_token: training FLOPs per token.
        checkpoints: the folder for `step_NNNNNN/`.
        config: the resolved configuration, stored in every checkpoint.
    """

    name: StageName
    model: GPT
    forward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    optimizer: ShardedOptimizer
    loader: BatchLoader
    schedule: Callable[[int], StepSchedule]
    evaluate: Callable[[], dict[str, float]]
    sample: Callable[[], list[dict[str, str]]]
    tokens_per_step: int
    tokens_per_epoch: int
    flops_per_token: int
    checkpoints: Path
    config: dict[str, Any]


@dataclass(frozen=True)
class Trackers:
    """Where a run can be followed. Metrics and W&B exist on rank 0 only."""

    console: Console
    metrics: MetricsLog | None = None
    wandb: WandbRun = field(default_factory=lambda: WandbRun(None))
    heartbeat: Heartbeat = field(default_factory=lambda: Heartbeat(None, ""))
    tensorboard: EventFiles | None = None

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record one step's values everywhere. A full disk costs the row, with a warning, and not the run."""
        if self.metrics is not None:
            try:
                self.metrics.log(step, values)
            except OSError as error:
                self.console.warning(f"metrics of step {step} could not be written: {error}")
            self.wandb.log(values, step)
            if self.tensorboard is not None:
                self.tensorboard.log(step, values)

    def samples(self, step: int, samples: list[dict[str, str]]) -> None:
        """Show what the model says."""
        for sample in samples:
            self.console.info(f"  {sample['prompt']!r} → {sample['text']!r}")
        self.wandb.table(keys.SAMPLES, samples, step)


@dataclass(frozen=True)
class ResumePoint:
    """What the loop itself restores from a checkpoint, whose tensors are long in place by then."""

    progress: Progress
    random_state: dict[str, str]
    fingerprint: str


@dataclass(frozen=True)
class TrainingResult:
    """How a stage ended."""

    progress: Progress
    evaluation: dict[str, float]
    samples: list[dict[str, str]]
    fingerprint: str
    peak_memory_bytes: int


@dataclass(frozen=True)
class _QueuedStep:
    """One step that the device has been told to do.

    Attributes:
        schedule: what it was done with.
        data_seconds: how long the host waited for its batch, in which time the device may have been busy.
        results: mean loss and gradient norm over all ranks, and how many of them were asked to stop: the same on
            each, in the host's memory, and to be read once it is done.
        done: what tells that it is, on a GPU.
    """

    schedule: StepSchedule
    data_seconds: float
    results: torch.Tensor
    done: torch.cuda.Event | None

    def wait(self) -> tuple[float, float, bool]:
        """Its loss and gradient norm, and whether any rank was asked to stop."""
        if self.done is not None:
            self.done.synchronize()
        loss, gradient_norm, stop_votes = self.results.tolist()
        return loss, gradient_norm, stop_votes > 0


def train(
    stage: Stage, cadence: Cadence, runtime: Runtime, trackers: Trackers, resumed: ResumePoint | None = None
) -> TrainingResult:
    """Train to the end of the horizon, from the start or from a checkpoint.

    The caller has already loaded the checkpoint into model, optimizer and loader; the loop restores its own part.

    Raises:
        StoppedForRequeueError: a signal asked to stop, and all that was trained is in a checkpoint.
        StopSignal: likewise, where the command is set to stop at once and there was nothing to write.
        CheckpointNotSavedError: the last checkpoint could not be written.
        NanochatError: the loss stayed non-finite.
    """
    progress = Progress()
    fingerprint = ""
    if resumed is not None:
        progress = resumed.progress
        restore_random_state(resumed.random_state, runtime.device)
        fingerprint = resumed.fingerprint
    if trackers.metrics is not None:
        # A fresh start owes nothing to what an earlier run may have left in the file, its step 0 included.
        trackers.metrics.resume(progress.step if resumed is not None else -1)
    evaluation = _evaluation_at(progress.step, runtime, trackers)
    samples: list[dict[str, str]] = []
    skips_in_a_row = 0
    first_step = True
    step = saved_step = progress.step
    queued: deque[_QueuedStep] = deque()
    recent: deque[float] = deque(maxlen=STEPS_TO_ESTIMATE_FROM)
    heartbeat = trackers.heartbeat

    with StopRequest() as stop, _live_bar(trackers.console, stage.name, cadence, progress) as show_progress:
        while True:
            stop.defers = step != saved_step
            if not evaluation and cadence.due(cadence.eval_every, step):
                heartbeat.beat("evaluating")
                evaluation = stage.evaluate()
                trackers.log(step, evaluation)
                trackers.console.info(f"step {step}/{cadence.num_steps} {format_fields(evaluation)}")
            if cadence.due(cadence.sample_every, step) and step > 0:
                samples = stage.sample() if runtime.is_main else []
                trackers.samples(step, samples)
                # A rank that went on would defer a stop that ends rank 0 here, and then wait for it in vain.
                barrier()
            if step == cadence.num_steps:
                break

            stop.defers = not first_step
            heartbeat.beat("starting" if first_step else "running")
            if not queued:
                last_done = time.perf_counter()
            queued.append(_queue_step(stage, runtime, stop, step))
            step += 1
            stop.defers = True
            evaluation = {}
            stop_agreed = False
            reads_all = first_step or cadence.uses_weights(step)
            while queued and (reads_all or stop_agreed or len(queued) > STEPS_AHEAD[runtime.device.type]):
                ended = queued.popleft()
                loss, gradient_norm, stop_wished = ended.wait()
                stop_agreed |= stop_wished
                now = time.perf_counter()
                seconds, last_done = now - last_done, now
                progress.step += 1
                progress.seconds += seconds
                recent.append(seconds)
                # A median, as the first step of a start may compile for a minute.
                seconds_left = statistics.median(recent) * (cadence.num_steps - progress.step)
                if math.isfinite(loss) and math.isfinite(gradient_norm):
                    progress.smoothed_loss = SMOOTHING * progress.smoothed_loss + (1 - SMOOTHING) * loss
                    skips_in_a_row = 0
                else:
                    progress.skipped_steps += 1
                    skips_in_a_row += 1
                    trackers.console.warning(
                        f"step {progress.step}: loss {loss}, gradient norm {gradient_norm}; skipped"
                    )
                if first_step and loss > 0 and gradient_norm == 0:
                    raise NanochatError(
                        f"{stage.name} would train nothing: the loss is {loss:.4g}, and its gradient 0",
                        "try --compile off; if that helps, this PyTorch compiles the model wrongly",
                    )
                show_progress(loss)
                heartbeat.beat(
                    "running",
                    step=progress.step,
                    num_steps=cadence.num_steps,
                    loss=loss,
                    step_seconds=seconds,
                    tokens_per_second=stage.tokens_per_step / seconds,
                    seconds_left=seconds_left,
                )
                if skips_in_a_row == MOST_SKIPS_IN_A_ROW:
                    raise NanochatError(
                        f"{stage.name} diverged: {MOST_SKIPS_IN_A_ROW} steps up to {progress.step} had no finite loss",
                        f"lower the learning rates, or go back: rm -r the newest folders in {stage.checkpoints}",
                    )
                if cadence.due(cadence.log_every, progress.step):
                    figures = (loss, gradient_norm, seconds, seconds_left)
                    _log_step(stage, cadence, runtime, trackers, progress, ended, *figures)

            if cadence.due(cadence.save_every, step) or stop_agreed:
                # Before evaluating: an evaluation that fails or is killed must not cost the trained weights.
                must_succeed = stop_agreed or step == cadence.num_steps
                heartbeat.beat("saving")
                if saved := _save(stage, cadence, runtime, trackers, progress, must_succeed):
                    fingerprint, saved_step = saved, step
                    heartbeat.beat(checkpoint=str(checkpoint_folder(stage.checkpoints, step)))
            if stop_agreed:
                raise _stopped(stage, cadence, progress, stop)
            if first_step:
                # What the set-up made lives for the whole run; the collector need not walk it again and again.
                gc.collect()
                gc.freeze()
                first_step = False

    # Of signals that came after the last step's vote; those that come from here on are not the loop's.
    if sum_over_ranks(torch.tensor(float(stop.signal_name is not None), device=runtime.device)).item() > 0:
        raise _stopped(stage, cadence, progress, stop)
    if progress.skipped_steps == progress.step:
        raise NanochatError(
            f"{stage.name} took no optimizer step: no loss was finite in {progress.step} steps",
            "lower the learning rates; nothing was trained",
        )
    return TrainingResult(progress, evaluation, samples, fingerprint, peak_memory_bytes(runtime.device))


def _queue_step(stage: Stage, runtime: Runtime, stop: StopRequest, step: int) -> _QueuedStep:
    """Accumulate and reduce the gradients of one global batch and update the weights, without waiting for the device.

    Where the loss or the gradients are not finite, the device itself skips the update.
    """
    schedule = stage.schedule(step)
    started = time.perf_counter()
    micro_batches = stage.loader.next_step()
    data_seconds = time.perf_counter() - started
    # The mean is over all targets of the global batch. A mean of the micro-batches' own means would count a target for
    # more where there are few of them, as in conversations of which only the answers are trained on.
    num_targets = torch.stack([(targets_BT != IGNORED_TARGET).sum() for _, targets_BT in micro_batches]).sum()
    share = runtime.world_size / sum_over_ranks(num_targets).clamp(min=1)
    loss_and_votes = torch.zeros(2, device=runtime.device)
    with stage.model.quantised():
        for index, (inputs_BT, targets_BT) in enumerate(micro_batches, 1):
            if index == len(micro_batches):
                stage.optimizer.reduce_during_backward()
            try:
                # Scaled by the world size, because the gradients are averaged over the ranks.
                loss = stage.forward(inputs_BT, targets_BT) * share
                loss.backward()  # type: ignore[no-untyped-call]  # torch ships this method without annotations.
            except torch.OutOfMemoryError:
                rows = inputs_BT.size(0)
                raise NanochatError(
                    f"{runtime.device} has too little memory for {rows} rows at once",
                    f"lower --device-batch-size, for example to {max(1, rows // 2)}: the result is the same, but for"
                    " roundings with --fp8",
                ) from None
            loss_and_votes[0] += loss.detach() / runtime.world_size
            # A large batch on a slow device takes longer than any step should.
            made_progress()
    loss_and_votes[1].fill_(stop.signal_name is not None)
    gradient_norm = stage.optimizer.reduce_gradients()
    mean_loss, stop_votes = sum_over_ranks(loss_and_votes).unbind()
    results = torch.stack((mean_loss, gradient_norm, stop_votes))
    stage.optimizer.step(schedule, results.isfinite().all())
    # From a GPU into pinned memory, as such a copy must be to go on by itself.
    results = results.to("cpu", non_blocking=True)
    done = torch.cuda.current_stream(runtime.device).record_event() if runtime.device.type == "cuda" else None
    return _QueuedStep(schedule, data_seconds, results, done)


def _stopped(stage: Stage, cadence: Cadence, progress: Progress, stop: StopRequest) -> StoppedForRequeueError:
    return StoppedForRequeueError(
        f"{stage.name} stopped at step {progress.step} of {cadence.num_steps} on "
        f"{stop.signal_name or 'the word of another rank'}, checkpoint in {stage.checkpoints}",
        "the same command carries on",
    )


@contextmanager
def _live_bar(console: Console, name: str, cadence: Cadence, progress: Progress) -> Iterator[Callable[[float], None]]:
    """On a terminal, a bar that is told the loss of each step. In a log file the lines of metrics are enough."""
    if not console.interactive:
        yield lambda loss: None
        return
    with console.progress(name, cadence.num_steps) as bar:
        bar.advance(progress.step)
        yield lambda loss: bar.advance(1, loss=loss)


def _evaluation_at(step: int, runtime: Runtime, trackers: Trackers) -> dict[str, float]:
    """The evaluation already recorded for a step, so that a resume neither repeats nor forgets it."""
    found: dict[str, float] = {}
    if trackers.metrics is not None:
        for row in read(trackers.metrics.path):
            if row["step"] == step and keys.BPB in row:
                found = {key: value for key, value in row.items() if key != "step"}
    recorded: dict[str, float] = from_main(found if runtime.is_main else None)
    return recorded


def _log_step(
    stage: Stage,
    cadence: Cadence,
    runtime: Runtime,
    trackers: Trackers,
    progress: Progress,
    ended: _QueuedStep,
    loss: float,
    gradient_norm: float,
    seconds: float,
    seconds_left: float,
) -> None:
    """Record and print one step."""
    schedule = ended.schedule
    tokens = progress.step * stage.tokens_per_step
    smoothed = progress.smoothed_loss / (1 - SMOOTHING ** max(1, progress.step - progress.skipped_steps))
    trackers.log(
        progress.step,
        {
            keys.LOSS: loss,
            keys.SMOOTHED_LOSS: smoothed,
            keys.GRADIENT_NORM: gradient_norm,
            keys.LR_MULTIPLIER: schedule.lr_multiplier,
            **{keys.learning_rate(name): lr for name, lr in stage.optimizer.learning_rates(schedule).items()},
            keys.MUON_MOMENTUM: schedule.muon_momentum,
            keys.TOKENS: tokens,
            keys.FLOPS: tokens * stage.flops_per_token,
            keys.EPOCH: tokens / stage.tokens_per_epoch,
            keys.SKIPPED_STEPS: progress.skipped_steps,
            keys.TOKENS_PER_SECOND: stage.tokens_per_step / seconds,
            keys.STEP_SECONDS: seconds,
            keys.DATA_SECONDS: ended.data_seconds,
            keys.TRAIN_SECONDS: progress.seconds,
            keys.ITER_NUM: cadence.num_steps,
            **_device_metrics(runtime, stage.flops_per_token * stage.tokens_per_step / seconds),
        },
    )
    trackers.console.info(
        f"step {progress.step}/{cadence.num_steps} loss={smoothed:.4f} "
        f"lr={schedule.lr_multiplier:.2f} norm={gradient_norm:.3f} "
        f"tok/s={format_count(round(stage.tokens_per_step / seconds))} left={format_seconds(seconds_left)}"
    )


def _device_metrics(runtime: Runtime, flops_per_second: float) -> dict[str, float]:
    """Rank 0's memory, as `nvidia-smi` shows it and as tensors use it, and what share of the GPUs' peak is used."""
    memory = {keys.MEMORY_RESERVED: peak_memory_bytes(runtime.device) / 1e9}
    if runtime.device.type != "cuda":
        return memory
    memory[keys.MEMORY_ALLOCATED] = torch.cuda.max_memory_allocated(runtime.device) / 1e9
    dtype = str(runtime.compute_dtype).removeprefix("torch.")
    peak = peak_flops(torch.cuda.get_device_name(runtime.device), dtype)
    return memory if peak is None else {**memory, keys.MFU: flops_per_second / (peak * runtime.world_size)}


def _save(
    stage: Stage,
    cadence: Cadence,
    runtime: Runtime,
    trackers: Trackers,
    progress: Progress,
    must_succeed: bool,
) -> str:
    """Write a checkpoint on rank 0, all ranks taking part in gathering it.

    A failed save in mid-run is a warning: training goes on, and the next save tries again.

    Returns:
        The checkpoint's fingerprint, on every rank; empty if the save failed.
    """
    loader_state = merge_states(gather_from_ranks(stage.loader.state_dict()))
    optimizer_state = stage.optimizer.state_dict()

    def write() -> tuple[str, CheckpointNotSavedError | None]:
        try:
            if trackers.metrics is not None:
                # First: a checkpoint whose metrics are lost in a power failure would never write them again.
                trackers.metrics.sync()
            fingerprint = save_checkpoint(
                stage.checkpoints,
                progress.step,
                model=stage.model.state_dict(),
                optimizer=optimizer_state,
                state={
                    "progress": vars(progress),
                    "loader": loader_state,
                    "random": random_state(runtime.device),
                },
                config=stage.config,
                keep=cadence.keep_checkpoints,
            )
        except CheckpointNotSavedError as failure:
            return "", failure
        except OSError as failure:
            return "", CheckpointNotSavedError(f"checkpoint of step {progress.step} could not be written: {failure}")
        return fingerprint, None

    # Not a broadcast, for which the other ranks would wait no longer than for any collective.
    fingerprint, error = run_on_main(write) or ("", None)
    saved: str = from_main(fingerprint)
    if not saved and must_succeed:
        raise error or StoppedWithMainError()
    if error is not None:
        trackers.console.warning(str(error))
    return saved

"""What changes from step to step: learning rate, Muon's momentum, Muon's weight decay.

Pure functions of (step, number of steps, configuration), so a resumed run computes what the first run would
have, with no scheduler state to save. The shapes and constants are those of karpathy/nanochat at 92d63d4,
with two repairs: its momentum jumps where the warm-down starts before the warm-up has ended, and its learning
rate never warms up fully when a run is shorter than the warm-up.
"""

import math
from dataclasses import dataclass

from nanochat.errors import UsageError


@dataclass(frozen=True)
class ScheduleConfig:
    """The shape of a run's schedules; the defaults are those of base training.

    Args:
        warmup_steps: steps of linear learning-rate warm-up; fewer if the warm-down would start earlier.
        warmdown_ratio: share of the run, at its end, over which the learning rate falls.
        final_lr_fraction: learning rate that the warm-down heads for, relative to the peak.
        momentum_start: Muon momentum at the first step.
        momentum_peak: Muon momentum after its warm-up.
        momentum_end: Muon momentum that the warm-down heads for.
        momentum_warmup_steps: steps from `momentum_start` to `momentum_peak`.

    Raises:
        UsageError: a value outside its range.
    """

    warmup_steps: int = 40
    warmdown_ratio: float = 0.65
    final_lr_fraction: float = 0.05
    momentum_start: float = 0.85
    momentum_peak: float = 0.97
    momentum_end: float = 0.90
    momentum_warmup_steps: int = 400

    def __post_init__(self) -> None:
        for name in ("warmup_steps", "momentum_warmup_steps"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} is {getattr(self, name)}", "give 0 or more steps")
        for name in ("warmdown_ratio", "final_lr_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name} is {getattr(self, name)}", "give a fraction from 0 to 1")
        if not 0 <= self.momentum_start <= self.momentum_peak < 1 or not 0 <= self.momentum_end <= self.momentum_peak:
            raise UsageError(
                f"Muon momentum cannot go {self.momentum_start} → {self.momentum_peak} → {self.momentum_end}",
                "give values from 0 to below 1, the peak the largest",
            )


@dataclass(frozen=True)
class StepSchedule:
    """What one optimizer step uses.

    Args:
        lr_multiplier: factor on every group's learning rate.
        muon_momentum: Nesterov momentum of the Muon groups.
        muon_weight_decay_multiplier: factor on the Muon groups' weight decay. The AdamW groups' stays as it
            is, since their decay already falls with the learning rate that multiplies it.
    """

    lr_multiplier: float
    muon_momentum: float
    muon_weight_decay_multiplier: float


def warmdown_start(num_steps: int, config: ScheduleConfig) -> int:
    """The step at which the learning rate begins to fall."""
    return num_steps - round(config.warmdown_ratio * num_steps)


def lr_multiplier(step: int, num_steps: int, config: ScheduleConfig) -> float:
    """Trapezoid: linear warm-up, constant, linear warm-down, in (0, 1].

    No step is wasted on a zero rate: the warm-up's first step already moves, and `final_lr_fraction` would be
    reached one step after the last.
    """
    start = warmdown_start(num_steps, config)
    warmup_steps = min(config.warmup_steps, start)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if step < start:
        return 1.0
    remaining = (num_steps - step) / (num_steps - start)
    return config.final_lr_fraction + remaining * (1 - config.final_lr_fraction)


def muon_momentum(step: int, num_steps: int, config: ScheduleConfig) -> float:
    """The lower of a line that rises over the warm-up and one that falls over the learning-rate warm-down.

    The minimum of two continuous lines is continuous, so nothing jumps where the two overlap, and a run too
    short to need a long memory of gradients simply never gets one.
    """
    rise = min(1.0, step / config.momentum_warmup_steps) if config.momentum_warmup_steps else 1.0
    rising = config.momentum_start + rise * (config.momentum_peak - config.momentum_start)
    start = warmdown_start(num_steps, config)
    fall = (step - start) / (num_steps - start) if step > start else 0.0
    falling = config.momentum_peak - fall * (config.momentum_peak - config.momentum_end)
    return min(rising, falling)


def muon_weight_decay_multiplier(step: int, num_steps: int) -> float:
    """Half a cosine from 1 at the first step to 0 one step after the last."""
    return 0.5 * (1 + math.cos(math.pi * step / num_steps))


def schedule_at(step: int, num_steps: int, config: ScheduleConfig) -> StepSchedule:
    """Everything that step `step` of `num_steps` uses, counted from 0.

    Raises:
        ValueError: `step` is not one of the run's steps.
    """
    if not 0 <= step < num_steps:
        raise ValueError(f"step {step} is not among the {num_steps} steps of the run")
    return StepSchedule(
        lr_multiplier=lr_multiplier(step, num_steps, config),
        muon_momentum=muon_momentum(step, num_steps, config),
        muon_weight_decay_multiplier=muon_weight_decay_multiplier(step, num_steps),
    )

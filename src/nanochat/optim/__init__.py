"""Muon for matrices and AdamW for the rest, sharded over any number of ranks, and their schedules."""

from nanochat.optim.optimizer import AdamWGroup, MuonGroup, ParameterGroup, ShardedOptimizer, check_coverage
from nanochat.optim.schedules import ScheduleConfig, StepSchedule, schedule_at

__all__ = [
    "AdamWGroup",
    "MuonGroup",
    "ParameterGroup",
    "ScheduleConfig",
    "ShardedOptimizer",
    "StepSchedule",
    "check_coverage",
    "schedule_at",
]

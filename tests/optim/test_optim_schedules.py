import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.errors import UsageError
from nanochat.optim.schedules import ScheduleConfig, StepSchedule, schedule_at, warmdown_start

BASE = ScheduleConfig()
fractions = st.floats(0, 1)


@st.composite
def configs(draw: st.DrawFn) -> ScheduleConfig:
    start, end, peak = draw(st.lists(st.floats(0, 0.999), min_size=3, max_size=3).map(sorted))
    if draw(st.booleans()):
        start, end = end, start
    return ScheduleConfig(
        warmup_steps=draw(st.integers(0, 600)),
        warmdown_ratio=draw(fractions),
        final_lr_fraction=draw(fractions),
        momentum_start=start,
        momentum_peak=peak,
        momentum_end=end,
        momentum_warmup_steps=draw(st.integers(0, 600)),
    )


def every_step(num_steps: int, config: ScheduleConfig) -> list[StepSchedule]:
    return [schedule_at(step, num_steps, config) for step in range(num_steps)]


@settings(deadline=None, max_examples=60)
@given(configs(), st.integers(1, 1500))
def test_any_horizon_gives_usable_values_and_never_wastes_a_step(config: ScheduleConfig, num_steps: int) -> None:
    for schedule in every_step(num_steps, config):
        assert 0 < schedule.lr_multiplier <= 1
        assert 0 <= schedule.muon_momentum <= config.momentum_peak
        assert 0 < schedule.muon_weight_decay_multiplier <= 1


@settings(deadline=None, max_examples=60)
@given(configs(), st.integers(1, 1500))
def test_the_learning_rate_rises_to_its_peak_before_the_warmdown_and_then_only_falls(
    config: ScheduleConfig, num_steps: int
) -> None:
    start = warmdown_start(num_steps, config)
    rates = [schedule.lr_multiplier for schedule in every_step(num_steps, config)]
    assert rates[:start] == sorted(rates[:start])
    assert rates[start:] == sorted(rates[start:], reverse=True)
    assert max(rates) == 1.0
    assert rates[-1] >= config.final_lr_fraction or math.isclose(rates[-1], config.final_lr_fraction)


@settings(deadline=None, max_examples=60)
@given(configs(), st.integers(2, 1500))
def test_momentum_never_jumps_wherever_warmup_and_warmdown_meet(config: ScheduleConfig, num_steps: int) -> None:
    rise_per_step = (config.momentum_peak - config.momentum_start) / max(1, config.momentum_warmup_steps)
    warmdown_steps = max(1, num_steps - warmdown_start(num_steps, config))
    fall_per_step = (config.momentum_peak - config.momentum_end) / warmdown_steps
    momenta = [schedule.muon_momentum for schedule in every_step(num_steps, config)]
    for before, after in itertools.pairwise(momenta):
        assert -fall_per_step - 1e-9 <= after - before <= rise_per_step + 1e-9


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 3000))
def test_muon_weight_decay_falls_from_all_of_it_towards_none(num_steps: int) -> None:
    decays = [schedule.muon_weight_decay_multiplier for schedule in every_step(num_steps, BASE)]
    assert decays[0] == 1
    assert decays == sorted(decays, reverse=True)
    assert decays[-1] == pytest.approx(math.sin(math.pi / (2 * num_steps)) ** 2)


def test_a_long_run_follows_the_published_schedule() -> None:
    # 4000 steps: warm-up to 40, warm-down from 1400, momentum .85 → .97 at 400 → .90.
    assert schedule_at(0, 4000, BASE) == StepSchedule(1 / 40, 0.85, 1.0)
    assert schedule_at(39, 4000, BASE).lr_multiplier == 1
    assert schedule_at(200, 4000, BASE).muon_momentum == pytest.approx(0.91)
    assert schedule_at(1000, 4000, BASE).muon_momentum == pytest.approx(0.97)
    assert schedule_at(1400, 4000, BASE).lr_multiplier == 1
    assert schedule_at(2700, 4000, BASE).lr_multiplier == pytest.approx(0.525)
    assert schedule_at(2700, 4000, BASE).muon_momentum == pytest.approx(0.935)
    assert schedule_at(2000, 4000, BASE).muon_weight_decay_multiplier == pytest.approx(0.5)
    assert schedule_at(3999, 4000, BASE).lr_multiplier == pytest.approx(0.05, abs=1e-3)
    assert schedule_at(3999, 4000, BASE).muon_momentum == pytest.approx(0.90, abs=1e-4)


def test_a_run_of_one_step_takes_it_at_the_full_rate() -> None:
    assert schedule_at(0, 1, BASE) == StepSchedule(1.0, 0.85, 1.0)


def test_a_run_of_ten_steps_warms_up_before_it_warms_down() -> None:
    rates = [schedule.lr_multiplier for schedule in every_step(10, BASE)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[9] == pytest.approx(1 / 6 + 5 / 6 * 0.05)


@pytest.mark.parametrize("step", [-1, 10])
def test_a_step_outside_the_run_is_refused(step: int) -> None:
    with pytest.raises(ValueError, match="not among the 10 steps"):
        schedule_at(step, 10, BASE)


@pytest.mark.parametrize(
    "wrong",
    [
        {"warmup_steps": -1},
        {"momentum_warmup_steps": -1},
        {"warmdown_ratio": 1.5},
        {"final_lr_fraction": -0.1},
        {"momentum_peak": 1.0},
        {"momentum_start": 0.98},
        {"momentum_end": 0.98},
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused_with_the_range_that_does(
    wrong: dict[str, float],
) -> None:
    with pytest.raises(UsageError, match=r"(give|from 0)"):
        ScheduleConfig(**wrong)

"""Intervals and differences are what the textbooks say, checked by integrating densities and by simulating."""

import math
import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.experiment.compare import verdict
from nanochat.experiment.statistics import difference, estimate, student_probability, student_quantile

SCORES = st.floats(0.3, 3.0)


def density(t: float, degrees: int) -> float:
    """Student's density, as defined."""
    scale = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)
    return math.exp(scale) / math.sqrt(degrees * math.pi) * (1 + t * t / degrees) ** (-(degrees + 1) / 2)


def integrated(t: float, degrees: int, steps: int = 2000) -> float:
    """The density from -t to t by Simpson's rule."""
    width = t / steps
    inner = sum(density(i * width, degrees) * (4 if i % 2 else 2) for i in range(1, steps))
    return 2 * width / 3 * (density(0, degrees) + inner + density(t, degrees))


@settings(deadline=None)
@given(t=st.floats(0, 15), degrees=st.integers(1, 60))
def test_the_probability_is_the_integral_of_the_density(t: float, degrees: int) -> None:
    assert student_probability(t, degrees) == pytest.approx(integrated(t, degrees), abs=1e-7)


@settings(deadline=None)
@given(degrees=st.integers(1, 200), confidence=st.floats(0.5, 0.999))
def test_the_quantile_undoes_the_probability(degrees: int, confidence: float) -> None:
    assert student_probability(student_quantile(degrees, confidence), degrees) == pytest.approx(confidence, abs=1e-9)


def test_quantiles_are_those_of_the_printed_tables() -> None:
    tabled = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262, 29: 2.045}
    assert {degrees: round(student_quantile(degrees), 3) for degrees in tabled} == tabled


@settings(deadline=None)
@given(values=st.lists(SCORES, min_size=2, max_size=8))
def test_an_interval_is_student_s(values: list[float]) -> None:
    found = estimate(values)
    error = statistics.stdev(values) / math.sqrt(len(values))
    assert found.mean == pytest.approx(statistics.fmean(values))
    assert found.half_width == pytest.approx(student_quantile(len(values) - 1) * error, abs=1e-12)


@settings(deadline=None)
@given(values=st.lists(st.tuples(SCORES, SCORES), min_size=2, max_size=6), level=st.floats(-1, 1))
def test_pairs_cancel_what_a_seed_does_to_both_arms(values: list[tuple[float, float]], level: float) -> None:
    arm = {seed: a for seed, (a, _) in enumerate(values)}
    reference = {seed: b for seed, (_, b) in enumerate(values)}
    found = difference(arm, reference)
    assert found == estimate([a - b for a, b in values], paired=True)
    shifted = difference({s: v + level * s for s, v in arm.items()}, {s: v + level * s for s, v in reference.items()})
    assert shifted.mean == pytest.approx(found.mean, abs=1e-9)
    assert shifted.half_width == pytest.approx(found.half_width, abs=1e-6)


@settings(deadline=None)
@given(a=st.lists(SCORES, min_size=2, max_size=6), b=st.lists(SCORES, min_size=2, max_size=6))
def test_arms_without_common_seeds_get_welch_s_interval(a: list[float], b: list[float]) -> None:
    found = difference(dict(enumerate(a)), dict(enumerate(b, start=100)))
    assert not found.paired
    assert found.mean == pytest.approx(statistics.fmean(a) - statistics.fmean(b))
    error = math.sqrt(statistics.variance(a) / len(a) + statistics.variance(b) / len(b))
    narrow, wide = student_quantile(len(a) + len(b) - 2), student_quantile(min(len(a), len(b)) - 1)
    assert found.half_width is not None
    assert narrow * error - 1e-12 <= found.half_width <= wide * error + 1e-12


def test_the_noisy_one_of_two_arms_decides_how_sure_welch_is() -> None:
    noisy = [0.0, 5.0, 10.0]
    found = difference({1: 1.0, 2: 1.001}, dict(enumerate(noisy, start=100)))
    assert found.half_width == pytest.approx(student_quantile(2) * math.sqrt(statistics.variance(noisy) / 3), rel=1e-6)


def test_intervals_hold_the_truth_nineteen_times_of_twenty() -> None:
    draw = random.Random(1)
    held = 0
    for _ in range(4000):
        common = [draw.gauss(0, 3) for _ in range(3)]
        arm = {seed: noise + draw.gauss(0.5, 1) for seed, noise in enumerate(common)}
        reference = {seed: noise + draw.gauss(0, 1) for seed, noise in enumerate(common)}
        found = difference(arm, reference)
        held += abs(found.mean - 0.5) <= (found.half_width or 0)
    assert held / 4000 == pytest.approx(0.95, abs=0.012)


def test_one_seed_is_no_verdict() -> None:
    text = verdict("a", "b", difference({1: 1.0}, {1: 1.1}))
    assert text.startswith("a has the better figure by 0.1000 bpb (shared validation; 1 seed)")
    assert "no verdict" in text


def test_a_clear_difference_names_the_better_arm_whichever_it_is() -> None:
    low, high = {1: 1.0, 2: 1.01, 3: 0.99}, {1: 1.1, 2: 1.112, 3: 1.088}
    assert verdict("a", "b", difference(low, high)).startswith("a is better than b by 0.1000 ± 0.0050 bpb")
    assert verdict("a", "b", difference(high, low)).startswith("b is better than a by 0.1000 ± 0.0050 bpb")
    assert "(shared validation; 3 seeds, paired)" in verdict("a", "b", difference(high, low))


@settings(deadline=None)
@given(pairs=st.lists(st.tuples(SCORES, SCORES), min_size=2, max_size=5))
def test_a_verdict_says_better_exactly_when_the_interval_leaves_zero_out(pairs: list[tuple[float, float]]) -> None:
    found = difference({s: a for s, (a, _) in enumerate(pairs)}, {s: b for s, (_, b) in enumerate(pairs)})
    text = verdict("a", "b", found)
    assert found.half_width is not None
    assert ("is better than" in text) == (abs(found.mean) > found.half_width)
    assert ("no difference shown" in text) == (abs(found.mean) <= found.half_width)

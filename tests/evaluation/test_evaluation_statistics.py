"""Scores: intervals that never leave the scale, and centred accuracies that say 0 for guessing."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.evaluation.statistics import Score, mean_centred, score_table, wilson_interval


@st.composite
def counts(draw: st.DrawFn) -> tuple[int, int]:
    n = draw(st.integers(1, 10**6))
    return draw(st.integers(0, n)), n


@given(counts())
def test_the_interval_holds_the_accuracy_and_stays_on_the_scale(count: tuple[int, int]) -> None:
    correct, n = count
    low, high = wilson_interval(correct, n)
    assert 0 <= low <= correct / n <= high <= 1
    assert low < high


@given(counts(), st.integers(2, 100))
def test_more_problems_make_the_interval_narrower(count: tuple[int, int], times: int) -> None:
    correct, n = count
    low, high = wilson_interval(correct, n)
    narrow_low, narrow_high = wilson_interval(correct * times, n * times)
    assert narrow_high - narrow_low < high - low


@given(counts())
def test_right_and_wrong_mirror_each_other(count: tuple[int, int]) -> None:
    correct, n = count
    low, high = wilson_interval(correct, n)
    assert wilson_interval(n - correct, n) == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_its_ends_are_where_the_accuracy_would_be_1_96_standard_errors_away() -> None:
    # Wilson's definition: the p for which |p̂ − p| = z · √(p(1 − p)/n).
    for end in wilson_interval(30, 40):
        assert abs(0.75 - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / 40), rel=1e-6)


def test_it_holds_the_truth_about_95_times_in_100() -> None:
    draw = random.Random(0)
    samples = [wilson_interval(sum(draw.random() < 0.3 for _ in range(60)), 60) for _ in range(2000)]
    assert 0.93 < sum(low <= 0.3 <= high for low, high in samples) / 2000 < 0.97


@pytest.mark.parametrize(("correct", "n"), [(0, 0), (-1, 3), (4, 3)])
def test_what_is_no_accuracy_is_refused(correct: int, n: int) -> None:
    with pytest.raises(ValueError, match="is no accuracy"):
        wilson_interval(correct, n)


def test_guessing_is_0_and_knowing_is_1() -> None:
    assert Score(100, 25, 0.25).centred == 0
    assert Score(100, 100, 0.25).centred == 1
    assert Score(100, 10, 0.25).centred == pytest.approx(-0.2)


def test_the_mean_counts_tasks_alike_and_errors_add_like_variances() -> None:
    scores = [Score(100, 50, 0.0), Score(400, 300, 0.5)]
    mean, error = mean_centred(scores)
    assert mean == pytest.approx((0.5 + 0.5) / 2)
    assert error == pytest.approx(math.hypot(0.05, math.sqrt(0.75 * 0.25 / 400) / 0.5) / 2)


def test_the_table_has_a_line_per_task_in_percent() -> None:
    lines = score_table({"arithmetic": Score(40, 30, 0.0), "library-kinds": Score(200, 50, 0.25)}).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split() == ["task", "n", "accuracy", "95", "%", "interval", "chance"]
    assert lines[1].split() == ["arithmetic", "40", "75.0%", "59.8%", "–", "85.8%", "0.0%"]

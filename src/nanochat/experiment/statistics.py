"""How sure a difference between two arms is, from what their seeds say.

Two runs that differ in nothing but the seed differ in their result. So a difference between arms means something
only beside that noise, which a few seeds measure and one cannot. Runs of two arms with the same seed begin with the
same weights and are dealt rows in the same pattern; part of the noise is common to both, and goes when they are
compared in pairs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


def student_probability(t: float, degrees: int) -> float:
    """The probability that Student's t with whole degrees of freedom lies within ± t.

    Finite sums in cosines: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    angle = math.atan(t / math.sqrt(degrees))
    cosine, sine = math.cos(angle), math.sin(angle)
    odd = degrees % 2
    term = total = (cosine if degrees > 1 else 0.0) if odd else 1.0
    for step in range(2 + odd, degrees - 1, 2):
        term *= cosine**2 * (step - 1) / step
        total += term
    return (angle + sine * total) * 2 / math.pi if odd else sine * total


def student_quantile(degrees: int, confidence: float = CONFIDENCE) -> float:
    """The t within ± which Student's t lies with this probability."""
    low, high = 0.0, 1.0
    while student_probability(high, degrees) < confidence:
        high *= 2
    while (middle := (low + high) / 2) not in (low, high):
        if student_probability(middle, degrees) < confidence:
            low = middle
        else:
            high = middle
    return high


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval.

    Attributes:
        mean: the mean.
        half_width: of the interval; None where one value leaves it unknown.
        n: how many values, or pairs.
        paired: whether it is a mean of differences between runs of the same seed.
    """

    mean: float
    half_width: float | None
    n: int
    paired: bool = False

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of 0."""
        return self.half_width is not None and abs(self.mean) > self.half_width


def estimate(values: Sequence[float], paired: bool = False) -> Estimate:
    """The mean of independent values, with Student's interval.

    Raises:
        ValueError: there are none.
    """
    n = len(values)
    if n == 0:
        raise ValueError("no value has no mean")
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(mean, None, n, paired)
    return Estimate(mean, student_quantile(n - 1) * math.sqrt(_variance(values) / n), n, paired)


def difference(arm: Mapping[int, float], reference: Mapping[int, float]) -> Estimate:
    """How much higher an arm is than the reference, from one value per seed of each.

    Pairs where two seeds or more are common. Else Welch's interval for two means of unequal variance, with his degrees
    of freedom rounded down, which widens it a little.

    Raises:
        ValueError: one of them has no value.
    """
    common = sorted(arm.keys() & reference.keys())
    if len(common) > 1:
        return estimate([arm[seed] - reference[seed] for seed in common], paired=True)
    a, b = list(arm.values()), list(reference.values())
    mean = estimate(a).mean - estimate(b).mean
    n = min(len(a), len(b))
    if n < 2:
        return Estimate(mean, None, n)
    squares = [_variance(values) / len(values) for values in (a, b)]
    if sum(squares) == 0:
        return Estimate(mean, 0.0, n)
    welch = sum(squares) ** 2 / sum(s**2 / (len(values) - 1) for s, values in zip(squares, (a, b), strict=True))
    # Below the smaller sample's own degrees only by rounding.
    degrees = max(n - 1, math.floor(welch))
    return Estimate(mean, student_quantile(degrees) * math.sqrt(sum(squares)), n)


def _variance(values: Sequence[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)

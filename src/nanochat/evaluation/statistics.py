"""How sure a score is, and scores on a scale where guessing is zero."""

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

# 95 % of a normal distribution lie within this many standard deviations of its mean.
Z_95 = 1.959963984540054


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """The 95 % interval of an accuracy, after Wilson (1927).

    Unlike the usual ± 1.96 standard errors it stays within 0 and 1 and is no point where all or none are right.

    Raises:
        ValueError: not 0 ≤ correct ≤ n, or n is 0.
    """
    if not 0 <= correct <= n or n == 0:
        raise ValueError(f"{correct} of {n} is no accuracy")
    share, spread = correct / n, Z_95**2 / n
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread**2 / 4) / (1 + spread)
    # Rounding must not push the interval off its own accuracy, or off the scale.
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


@dataclass(frozen=True)
class Score:
    """How many problems were solved.

    Attributes:
        n: problems examined, at least 1.
        correct: of these, solved.
        chance: the accuracy of guessing, 0 up to but not including 1.
    """

    n: int
    correct: int
    chance: float

    @property
    def accuracy(self) -> float:
        """The share that was solved."""
        return self.correct / self.n

    @property
    def low(self) -> float:
        """Lower end of the accuracy's 95 % interval."""
        return wilson_interval(self.correct, self.n)[0]

    @property
    def high(self) -> float:
        """Upper end of the accuracy's 95 % interval."""
        return wilson_interval(self.correct, self.n)[1]

    @property
    def centred(self) -> float:
        """The accuracy on a scale where guessing is 0 and knowing everything is 1; below 0 if worse than guessing."""
        return (self.accuracy - self.chance) / (1 - self.chance)

    @property
    def centred_error(self) -> float:
        """The standard error of `centred`."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.n) / (1 - self.chance)

    def as_json(self) -> dict[str, Any]:
        """The counts and what follows from them."""
        derived = ("accuracy", "low", "high", "centred", "centred_error")
        return {**asdict(self), **{name: getattr(self, name) for name in derived}}


def mean_centred(scores: Collection[Score]) -> tuple[float, float]:
    """The mean of the centred accuracies of independent tasks, each counting the same, and its standard error."""
    mean = math.fsum(score.centred for score in scores) / len(scores)
    return mean, math.sqrt(math.fsum(score.centred_error**2 for score in scores)) / len(scores)


def score_table(scores: Mapping[str, Score]) -> str:
    """A table for the terminal: a line per task with its accuracy, 95 % interval and chance, in percent."""
    rows = [("task", "n", "accuracy", "95 % interval", "chance")]
    rows += [
        (name, str(s.n), f"{s.accuracy:.1%}", f"{s.low:.1%} – {s.high:.1%}", f"{s.chance:.1%}")
        for name, s in scores.items()
    ]
    name_width, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    return "\n".join(
        "  ".join([name.ljust(name_width), *(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))])
        for name, *cells in rows
    )

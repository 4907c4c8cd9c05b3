"""Curves as PNG files, the same bytes for the same numbers."""

import atexit
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.files import whole_file

Points = tuple[Sequence[float], Sequence[float]]

# Okabe and Ito (2008), jfly.uni-koeln.de/color: told apart under every common form of colour blindness. Their
# yellow is left out, as it cannot be read on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")


@dataclass(frozen=True)
class Panel:
    """One plot of a figure: curves over one axis.

    Attributes:
        series: for each label the x and the y values, equally many. Values that are not finite, and on a
            logarithmic axis those not above zero, leave a gap.
        title: above the plot.
        xlabel: the x axis, with its unit.
        ylabel: the y axis, with its unit.
        log_y: draw y on a logarithmic axis.
        baseline: levels to compare with, drawn as dashed lines.
    """

    series: Mapping[str, Points]
    title: str
    xlabel: str
    ylabel: str
    log_y: bool = False
    baseline: Mapping[str, float] | None = None


def plot_curves(
    path: Path,
    series: Mapping[str, Points],
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    log_y: bool = False,
    baseline: Mapping[str, float] | None = None,
) -> None:
    """Write a PNG of one `Panel`, atomically.

    Raises:
        ValueError: a series has not as many x as y values.
    """
    plot_panels(path, [Panel(series, title, xlabel, ylabel, log_y, baseline)])


def plot_panels(path: Path, panels: Sequence[Panel]) -> None:
    """Write a PNG of one or more panels, two in a row, atomically.

    Raises:
        ValueError: a series has not as many x as y values.
    """
    _give_matplotlib_a_home()
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    with matplotlib.rc_context():
        # A user's matplotlibrc must not change what a report looks like.
        matplotlib.rcdefaults()
        # Titles come from users: a "$" in one is a dollar, not a formula. Chunks keep Agg from giving up on
        # very long noisy curves.
        matplotlib.rcParams.update({"text.parse_math": False, "agg.path.chunksize": 10_000})
        # In inches; matplotlib's own padding leaves labels at the very edge.
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
        figure = Figure(figsize=(8 * columns, 4.5 * rows), dpi=120, layout=layout)
        FigureCanvasAgg(figure)
        for place, panel in enumerate(panels, start=1):
            _draw(figure.add_subplot(rows, columns, place), panel)
        with whole_file(path) as temporary, temporary.open("wb") as stream:
            # matplotlib's own version in the metadata would make equal plots differ.
            figure.savefig(stream, format="png", metadata={"Software": None})


def _draw(axes: Any, panel: Panel) -> None:
    def drawable(y: float) -> bool:
        return math.isfinite(y) and (y > 0 or not panel.log_y)

    lines, labels = [], []
    for index, (label, (x, y)) in enumerate(panel.series.items()):
        if len(x) != len(y):
            raise ValueError(f"series {label!r} has {len(x)} x values and {len(y)} y values")
        values = [value if drawable(value) else math.nan for value in y]
        # A single point has no line to be seen by.
        marker = "o" if sum(map(math.isfinite, values)) == 1 else ""
        lines += axes.plot(x, values, color=COLOURS[index % len(COLOURS)], linewidth=1.5, marker=marker)
        labels.append(label)
    for index, (label, level) in enumerate((panel.baseline or {}).items()):
        if drawable(level):
            colour = COLOURS[(len(panel.series) + index) % len(COLOURS)]
            lines.append(axes.axhline(level, color=colour, linewidth=1.2, linestyle="--"))
            labels.append(label)
    if panel.log_y:
        axes.set_yscale("log")
    axes.set(title=panel.title, xlabel=panel.xlabel, ylabel=panel.ylabel)
    axes.grid(visible=True, color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if len(lines) > 1:
        axes.legend(lines, labels, frameon=False)


def _give_matplotlib_a_home() -> None:
    """Keep matplotlib's font cache out of a home folder, which may be full, shared, or missing."""
    if "matplotlib" in sys.modules or "MPLCONFIGDIR" in os.environ:
        return
    home = tempfile.mkdtemp(prefix="nanochat-matplotlib-")
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    os.environ["MPLCONFIGDIR"] = home

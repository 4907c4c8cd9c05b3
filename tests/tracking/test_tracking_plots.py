import math
import os
import subprocess
import sys
import textwrap

import pytest

from nanochat.tracking.plots import plot_curves

LABELS = {"title": "Base", "xlabel": "step", "ylabel": "loss"}
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def curves():
    steps = list(range(200))
    return {"train": (steps, [3 / (step + 1) for step in steps]), "val": (steps[::20], [1.0] * 10)}


def test_the_same_numbers_give_the_same_bytes(tmp_path, curves):
    plot_curves(tmp_path / "a.png", curves, baseline={"GPT-2": 0.75}, **LABELS)
    plot_curves(tmp_path / "b.png", curves, baseline={"GPT-2": 0.75}, **LABELS)
    content = (tmp_path / "a.png").read_bytes()
    assert content.startswith(PNG)
    assert content == (tmp_path / "b.png").read_bytes()
    assert b"Software" not in content


def test_other_numbers_a_baseline_or_a_logarithmic_axis_give_another_picture(tmp_path, curves):
    plot_curves(tmp_path / "0.png", curves, **LABELS)
    plot_curves(tmp_path / "1.png", curves, baseline={"GPT-2": 0.75}, **LABELS)
    plot_curves(tmp_path / "2.png", curves, log_y=True, **LABELS)
    plot_curves(tmp_path / "3.png", {"train": curves["train"]}, **LABELS)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 4


def test_a_diverged_loss_can_be_drawn(tmp_path):
    series = {"loss": ([0, 1, 2, 3], [2.0, math.nan, math.inf, -1.0])}
    plot_curves(tmp_path / "a.png", series, log_y=True, baseline={"none": math.nan}, **LABELS)
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)


def test_nothing_to_draw_is_an_empty_plot(tmp_path):
    plot_curves(tmp_path / "a.png", {}, **LABELS)
    plot_curves(tmp_path / "b.png", {"x": ([], [])}, log_y=True, **LABELS)
    assert all(path.read_bytes().startswith(PNG) for path in tmp_path.iterdir())


def test_a_dollar_is_a_dollar_and_any_label_is_in_the_legend(tmp_path, curves):
    hostile = {"$\\frac{": curves["train"], "_hidden": curves["val"]}
    plot_curves(tmp_path / "a.png", hostile, title="$x_{", xlabel="\\", ylabel="^")
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)


def test_curves_must_have_as_many_x_as_y_values(tmp_path):
    with pytest.raises(ValueError, match="'loss' has 2 x values and 1 y values"):
        plot_curves(tmp_path / "a.png", {"loss": ([0, 1], [1.0])}, **LABELS)
    assert list(tmp_path.iterdir()) == []


def draw_in_new_process(folder, environment):
    script = f"""
        from pathlib import Path
        from nanochat.tracking.plots import plot_curves
        points = ([0, 1], [2.0, 1.0])
        plot_curves(Path({str(folder / "plot.png")!r}), {{"loss": points}}, title="t", xlabel="x", ylabel="y")
    """
    base = {name: value for name, value in os.environ.items() if name not in ("HOME", "MPLCONFIGDIR")}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**base, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (folder / "plot.png").read_bytes().startswith(PNG)
    return done.stderr


def test_plots_need_no_home_and_leave_nothing_in_it(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    said = draw_in_new_process(tmp_path, {"HOME": str(home), "TMPDIR": str(temporary)})
    assert said == ""
    assert list(home.iterdir()) == []
    assert list(temporary.iterdir()) == []


def test_plots_work_where_matplotlib_cannot_write_its_configuration(tmp_path):
    (tmp_path / "file").touch()
    draw_in_new_process(tmp_path, {"MPLCONFIGDIR": str(tmp_path / "file" / "below")})

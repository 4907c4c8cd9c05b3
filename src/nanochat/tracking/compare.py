"""Runs side by side, from their local files: curves, final figures, and whether anything differed that should not.

Two curves say something about what is meant to differ only if nothing else did. So the page begins with that.
"""

import base64
import html
import importlib.resources
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.errors import DataError, UsageError
from nanochat.files import whole_folder, write_json, write_text
from nanochat.tracking import keys
from nanochat.tracking.metrics import Value, read, to_json_value
from nanochat.tracking.plots import COLOURS, Panel, plot_panels
from nanochat.tracking.runs import METRICS_NAME, RunRecord

PAGE_NAME = "index.html"
DATA_NAME = "comparison.json"
LARGEST_SPELT_OUT = 10**12

AXES = {"step": "steps", "tokens": "training tokens", "flops": "training FLOPs", "seconds": "seconds in steps"}
CURVES = {
    "loss": ((keys.SMOOTHED_LOSS, keys.LOSS), "training loss", "nats per token"),
    "bpb": ((keys.BPB,), "validation", "bits per byte"),
}

# What decides a result beside the settings, with where the configuration says it.
ASPECTS = {
    "code": ("runtime/git_commit", "runtime/git_dirty"),
    "image": ("runtime/image",),
    "data": ("data/fingerprint",),
    "tokenizer": ("tokenizer",),
    "machine": ("runtime/device", "runtime/world_size", "dtype"),
}


@dataclass(frozen=True)
class ComparedRun:
    """One stage of one run.

    Attributes:
        label: what it is called in the comparison.
        record: what it was.
        rows: its metrics.
    """

    label: str
    record: RunRecord
    rows: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path, label: str) -> "ComparedRun":
        """Read a stage's folder.

        Raises:
            DataError: it has no metrics, or something is damaged.
        """
        rows = read(folder / METRICS_NAME)
        if not rows:
            raise DataError(f"{folder / METRICS_NAME} has no rows yet", "compare it when it has begun")
        return cls(label, RunRecord.read(folder), rows)

    def curve(self, names: Sequence[str], axis: str) -> tuple[list[float], list[float]]:
        """The first of these metrics that it has, over `step`, `tokens`, `flops` or `seconds`."""
        name = next((name for name in names if any(name in row for row in self.rows)), names[0])
        per_step: dict[str, float] = {"step": 1}
        per_step["tokens"] = self.record.config.get("train/tokens_per_step", 0)
        per_step["flops"] = per_step["tokens"] * self.record.config.get("model/flops_per_token", 0)
        seconds, x, y = 0.0, [], []
        for row in self.rows:
            # Evaluations have no clock of their own: they are where the step before them ended.
            seconds = row.get(keys.TRAIN_SECONDS, seconds)
            if name in row:
                x.append(seconds if axis == "seconds" else row["step"] * per_step[axis])
                y.append(row[name])
        return x, y

    def figures(self) -> dict[str, Value]:
        """What the table shows."""
        last = {key: value for row in self.rows for key, value in row.items()}
        shown = {
            "state": self.record.state,
            "steps": last["step"],
            "tokens": last.get(keys.TOKENS),
            "FLOPs": last.get(keys.FLOPS),
            "parameters (M)": self.record.config.get("model/total_params_M"),
            "seconds in steps": last.get(keys.TRAIN_SECONDS),
            "tokens per second": last.get(keys.TOKENS_PER_SECOND),
            "loss (smoothed)": last.get(keys.SMOOTHED_LOSS),
            **{key: last[key] for key in sorted(last) if key.startswith("epoch/") and isinstance(last[key], float)},
        }
        return {name: value for name, value in shown.items() if value is not None}


def differences(records: Mapping[str, RunRecord]) -> dict[str, dict[str, dict[str, Any]]]:
    """What is not the same in all runs: for each aspect, the settings and their values by run.

    An aspect is `code`, `image`, `data`, `tokenizer`, `machine` or `settings`; those without differences are empty.
    Code that was changed since its commit differs from everything, itself included.
    """
    configs = {label: record.config for label, record in records.items()}
    names = dict(ASPECTS)
    apart = {name for aspect in names.values() for name in aspect} | {"data"}
    flat = {label: _flat(config.get("identity", {})) for label, config in configs.items()}
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for aspect, fields in names.items():
        values = {field: {label: config.get(field) for label, config in configs.items()} for field in fields}
        found[aspect] = {field: told for field, told in values.items() if _differ(told)}
    if any(config.get("runtime/git_dirty") for config in configs.values()):
        found["code"]["runtime/git_dirty"] = {
            label: config.get("runtime/git_dirty") for label, config in configs.items()
        }
    settings = sorted({name for config in flat.values() for name in config} - apart)
    told = {name: {label: config.get(name) for label, config in flat.items()} for name in settings}
    found["settings"] = {name: values for name, values in told.items() if _differ(values)}
    return found


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, item in value.items():
        flat |= _flat(item, f"{prefix}{name}.") if isinstance(item, Mapping) else {f"{prefix}{name}": item}
    return flat


def _differ(values: Mapping[str, Any]) -> bool:
    return len({json.dumps(value, sort_keys=True) for value in values.values()}) > 1


def say_differences(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The differences in a sentence."""
    same = [aspect for aspect, fields in found.items() if not fields]
    other = [f"{aspect} ({', '.join(fields)})" for aspect, fields in found.items() if fields]
    parts = [f"They differ in {'; '.join(other)}." if other else "Nothing is known to differ between them."]
    if other and same:
        parts.append(f"The same: {', '.join(same)}.")
    return " ".join(parts)


def write_comparison(folder: Path, runs: Sequence[ComparedRun], title: str) -> Path:
    """Write a folder with `index.html`, which needs no other file, the curves as PNG, and `comparison.json`.

    Args:
        folder: an earlier comparison there is replaced.
        runs: two or more, each with a label of its own.
        title: above all.

    Returns:
        The page.

    Raises:
        UsageError: there are not two runs, two have one label, or something else is at `folder`.
    """
    if len(runs) < 2 or len({run.label for run in runs}) < len(runs):
        raise UsageError("a comparison needs two or more different runs", "name them: nanochat compare A B")
    own = {PAGE_NAME, DATA_NAME, *(f"{curve}.png" for curve in CURVES)}
    if folder.exists() and not (folder.is_dir() and {path.name for path in folder.iterdir()} <= own):
        raise UsageError(
            f"{folder} holds something else than a comparison", "move it away, or choose another folder with --to"
        )
    found = differences({run.label: run.record for run in runs})
    figures = {run.label: run.figures() for run in runs}
    curves = {
        curve: {axis: {run.label: run.curve(names, axis) for run in runs} for axis in AXES}
        for curve, (names, _, _) in CURVES.items()
    }
    with whole_folder(folder) as place:
        for curve, (_, name, unit) in CURVES.items():
            panels = [Panel(curves[curve][axis], name, xlabel, unit) for axis, xlabel in AXES.items()]
            plot_panels(place / f"{curve}.png", panels)
        comparison = {"title": title, "differences": found, "figures": figures, "curves": curves}
        write_json(place / DATA_NAME, to_json_value(comparison))
        write_text(place / PAGE_NAME, _page(title, found, figures, curves, place))
    return folder / PAGE_NAME


def _page(
    title: str,
    found: Mapping[str, Mapping[str, Mapping[str, Any]]],
    figures: Mapping[str, Mapping[str, Value]],
    curves: Mapping[str, Any],
    place: Path,
) -> str:
    labels = list(figures)
    rows = list(dict.fromkeys(name for values in figures.values() for name in values))
    differing = {name: values for fields in found.values() for name, values in fields.items()}
    images = [
        f'<img alt="{html.escape(name)}" src="data:image/png;base64,'
        f'{base64.b64encode((place / f"{curve}.png").read_bytes()).decode()}">'
        for curve, (_, name, _) in CURVES.items()
    ]
    data = {"curves": curves, "axes": AXES, "colours": COLOURS, "names": {key: row[1:] for key, row in CURVES.items()}}
    parts = {
        "TITLE": html.escape(title),
        "DIFFERENCES": f"<p>{html.escape(say_differences(found))}</p>" + _table(labels, differing),
        "FIGURES": _table(labels, {row: {label: figures[label].get(row) for label in labels} for row in rows}),
        "IMAGES": "\n".join(images),
        # "</script>" in a run's name would end the script.
        "DATA": json.dumps(to_json_value(data), allow_nan=False).replace("</", "<\\/"),
    }
    page = importlib.resources.files("nanochat.tracking").joinpath("compare.html").read_text(encoding="utf-8")
    for name, content in parts.items():
        page = page.replace(f"<!--{name}-->", content)
    return page


def _table(labels: Sequence[str], rows: Mapping[str, Mapping[str, Any]]) -> str:
    if not rows:
        return ""

    def line(name: str, cells: Sequence[object], tag: str) -> str:
        shown = "".join(f"<{tag}>{html.escape(_cell(cell))}</{tag}>" for cell in cells)
        return f"<tr><th>{html.escape(name)}</th>{shown}</tr>"

    body = [line(name, [values.get(label) for label in labels], "td") for name, values in rows.items()]
    return f"<table>{line('', labels, 'th')}{''.join(body)}</table>"


def _cell(value: object) -> str:
    if isinstance(value, float) or (isinstance(value, int) and abs(value) >= LARGEST_SPELT_OUT):
        return f"{value:.5g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "" if value is None else str(value)

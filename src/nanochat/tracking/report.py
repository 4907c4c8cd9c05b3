"""The report of a run: every stage leaves a section as JSON, and `report.md` is rendered from them.

The markdown is never parsed back: whoever wants a figure reads `report/sections/<stage>.json`. The text in a
report comes from people and from models, so all of it is escaped: no prompt, sample or run name can break a
table, end a block, or become HTML.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self, get_args

from nanochat.errors import DataError
from nanochat.files import read_json, write_text
from nanochat.tracking.console import format_bytes, format_seconds
from nanochat.tracking.environment import describe_environment
from nanochat.tracking.metrics import Value, to_json_value
from nanochat.workspace import SAFE_NAME

ReportStage = Literal["corpus", "tokenizer", "tokenize", "base", "mid", "sft", "rl", "eval"]

# The order of the pipeline, and of the report.
STAGES: tuple[ReportStage, ...] = get_args(ReportStage)
TRAINING_STAGES: tuple[ReportStage, ...] = ("base", "mid", "sft", "rl")

MISSING = "\N{EN DASH}"


@dataclass(frozen=True)
class Plot:
    """A picture that lies beside `report.md`."""

    file: str
    caption: str


@dataclass(frozen=True)
class Sample:
    """What a model made of a prompt."""

    prompt: str
    text: str


@dataclass(frozen=True)
class Section:
    """What one stage has to report. Mappings keep their order.

    Attributes:
        title: the section's heading.
        figures: its own table, label to value.
        config: the resolved configuration, JSON-able.
        plots: pictures, as file names in the report's folder.
        samples: prompts with what the model answered.
        summary: figures to compare across stages; each stage is a column of the summary table.
        compared: the same about other stages, by their names.
        gpus: how many GPUs the stage held.
        seconds: wall clock of the stage.
        notes: sentences worth a reader's attention.
        environment: `describe_environment()` on the machine that ran the stage.

    Raises:
        ValueError: a field is not of its type; the message says which.
    """

    title: str
    figures: dict[str, Value] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    plots: list[Plot] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    summary: dict[str, Value] = field(default_factory=dict)
    compared: dict[str, dict[str, Value]] = field(default_factory=dict)
    gpus: int = 0
    seconds: float | None = None
    notes: list[str] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require(_is_text(self.title) and self.title.strip() != "", "title must be a text")
        _require(
            isinstance(self.compared, dict) and self.compared.keys() <= set(STAGES),
            "compared must map stages to tables",
        )
        _require(isinstance(self.gpus, int) and self.gpus >= 0, "gpus must be a number of GPUs")
        tables = {"figures": self.figures, "summary": self.summary, **self.compared}
        for name, table in tables.items():
            _require(_has_text_keys(table), f"{name} must map labels to values")
            _require(
                all(isinstance(value, Value) for value in table.values()),
                f"{name} must hold numbers or texts",
            )
        for name in ("config", "environment"):
            _require(_has_text_keys(getattr(self, name)), f"{name} must be an object")
        for name, kind in (("plots", Plot), ("samples", Sample), ("notes", str)):
            items = getattr(self, name)
            _require(
                isinstance(items, list) and all(isinstance(item, kind) for item in items),
                f"{name} must be a list of {kind.__name__}",
            )
        for plot in self.plots:
            _require(
                _is_text(plot.file) and SAFE_NAME.fullmatch(plot.file) is not None and _is_text(plot.caption),
                "plots must name files in the report's folder, with captions",
            )
        _require(
            all(_is_text(sample.prompt) and _is_text(sample.text) for sample in self.samples),
            "samples must hold texts",
        )
        _require(
            self.seconds is None
            or (isinstance(self.seconds, int | float) and math.isfinite(self.seconds) and self.seconds >= 0),
            "seconds must be a duration",
        )

    def to_json(self) -> dict[str, Any]:
        """The section as JSON-able values; figures that are not finite become strings."""
        return {name: to_json_value(value) for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """The section that `to_json` wrote.

        Raises:
            ValueError: it is not a section; the message says why.
        """
        _require(_has_text_keys(data), "a section must be an object")
        known = {entry.name for entry in fields(cls)}
        _require("title" in data, "title must be a text")
        _require(data.keys() <= known, f"unknown: {', '.join(sorted(data.keys() - known))}")
        plots = [Plot(**_exactly(item, "plots", "file", "caption")) for item in _list(data, "plots")]
        samples = [Sample(**_exactly(item, "samples", "prompt", "text")) for item in _list(data, "samples")]
        return cls(**{**data, "plots": plots, "samples": samples})


def write_section(report_folder: Path, stage: ReportStage, section: Section) -> Path:
    """Write a stage's section, atomically, in place of the one it left before. Returns the file."""
    path = _section_path(report_folder, stage)
    # Not `write_json`, which sorts keys: the order of figures is the author's.
    text = json.dumps(section.to_json(), indent=2, allow_nan=False)
    write_text(path, text + "\n")
    return path


def read_sections(report_folder: Path) -> dict[ReportStage, Section]:
    """Read the sections there are, in the order of the pipeline.

    Raises:
        DataError: a section is damaged.
    """
    sections: dict[ReportStage, Section] = {}
    for stage in STAGES:
        path = _section_path(report_folder, stage)
        if not path.exists():
            continue
        fix = f"delete it and run the stage {stage} again"
        data = read_json(path, fix)
        try:
            sections[stage] = Section.from_json(data)
        except ValueError as error:
            raise DataError(f"{path} is not a section of a report ({error})", fix) from None
    return sections


def render_report(report_folder: Path, run: str, gpu_hour_price: float | None = None) -> Path:
    """Write `report.md` from the sections in `report_folder/sections`. Returns the file.

    Args:
        report_folder: where the sections are.
        run: the run's name, for the title.
        gpu_hour_price: what an hour of one GPU costs, to tell what the stages cost.

    The environment shown first is that of the last training stage that recorded its own, since a report is
    often rendered on another machine than the one that trained.

    Raises:
        DataError: there is no section yet, or one is damaged.
    """
    sections = read_sections(report_folder)
    if not sections:
        raise DataError(f"{report_folder} has no section to report", "run a stage of the pipeline first")
    blocks = [
        f"# nanochat report: {_inline(run)}",
        "## Environment",
        *_environment_table(_environment_of(sections)),
        *_summary(sections),
        "## Wall clock",
        *_wall_clock(sections, gpu_hour_price),
    ]
    for section in sections.values():
        blocks += _section_blocks(report_folder, section)
    path = report_folder / "report.md"
    write_text(path, "\n\n".join(blocks) + "\n")
    return path


def _section_path(report_folder: Path, stage: ReportStage) -> Path:
    return report_folder / "sections" / f"{stage}.json"


def _environment_of(sections: Mapping[ReportStage, Section]) -> dict[str, Any]:
    recorded = {stage: section.environment for stage, section in sections.items() if section.environment}
    trained = [environment for stage, environment in recorded.items() if stage in TRAINING_STAGES]
    return (trained or list(recorded.values()) or [describe_environment()])[-1]


def _environment_table(environment: Mapping[str, Any]) -> list[str]:
    rows = [(_label(name), _described(name, value)) for name, value in environment.items()]
    return [_table(("What", "Value"), rows, align="---")]


def _described(name: str, value: Any) -> str:
    """One line for a value of an environment; equal items of a list, such as a node's GPUs, are counted."""
    if isinstance(value, Mapping):
        return ", ".join(f"{_label(key).lower()} {_described(key, item)}" for key, item in value.items())
    if isinstance(value, list):
        counts = Counter(_described(name, item) for item in value)
        return "; ".join(
            f"{count} \N{MULTIPLICATION SIGN} {item}" if count > 1 else item for item, count in counts.items()
        )
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and name.endswith("_bytes"):
        return format_bytes(value)
    return str(value)


def _label(name: str) -> str:
    words = name.removesuffix("_bytes").replace("_", " ")
    return words.upper() if words in {"cpu", "os"} else "GPUs" if words == "gpus" else words[:1].upper() + words[1:]


def _summary(sections: Mapping[ReportStage, Section]) -> list[str]:
    columns: dict[str, dict[str, Value]] = {
        stage: dict(section.summary)
        for stage, section in sections.items()
        if stage in TRAINING_STAGES or section.summary
    }
    for section in sections.values():
        for stage, figures in section.compared.items():
            columns.setdefault(stage, {}).update(figures)
    # A dictionary, as an ordered set: metrics in the order in which the stages first name them.
    metrics = {metric: None for summary in columns.values() for metric in summary}
    if not metrics:
        return []
    rows = [
        (metric, *(_value(summary[metric]) if metric in summary else MISSING for summary in columns.values()))
        for metric in metrics
    ]
    return ["## Summary", _table(("Metric", *(stage.upper() for stage in columns)), rows)]


def _wall_clock(sections: Mapping[ReportStage, Section], gpu_hour_price: float | None) -> list[str]:
    """Time per stage and, where GPUs were held, their hours and what those cost."""
    header = ["Stage", "Time"]
    timed = [(section, section.seconds or 0.0) for section in sections.values()]
    rows = [
        [section.title, MISSING if section.seconds is None else format_seconds(section.seconds)]
        for section in sections.values()
    ]
    rows.append(["Total", format_seconds(sum(seconds for _, seconds in timed))])
    if any(section.gpus for section in sections.values()):
        hours = [section.gpus * seconds / 3600 for section, seconds in timed]
        hours.append(sum(hours))
        header.append("GPU hours")
        for row, value in zip(rows, hours, strict=True):
            row.append(f"{value:.2f}")
        if gpu_hour_price is not None:
            header.append(f"Cost at {gpu_hour_price:g} per GPU hour")
            for row, value in zip(rows, hours, strict=True):
                row.append(f"{value * gpu_hour_price:,.2f}")
    return [_table(header, rows)]


def _section_blocks(report_folder: Path, section: Section) -> list[str]:
    blocks = [f"## {_inline(section.title)}"]
    if section.figures:
        rows = [(label, _value(value)) for label, value in section.figures.items()]
        blocks.append(_table(("Figure", "Value"), rows))
    if section.notes:
        blocks.append("\n".join(f"- {_item(note)}" for note in section.notes))
    for plot in section.plots:
        if (report_folder / plot.file).is_file():
            blocks.append(f"![{_inline(plot.caption)}]({plot.file})")
        else:
            blocks.append(f"({_inline(plot.caption)}: {_inline(plot.file)} is missing)")
    for sample in section.samples:
        blocks += ["Prompt:", _fenced("text", sample.prompt), "Model:", _fenced("text", sample.text)]
    if section.config:
        blocks += _details("Configuration", section.config)
    if section.environment:
        blocks += _details("Where it ran", section.environment)
    return blocks


def _details(summary: str, value: Mapping[str, Any]) -> list[str]:
    """A folded block. The blank lines around the fence are what makes it markdown inside the HTML."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return [f"<details><summary>{summary}</summary>", _fenced("json", text), "</details>"]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], align: str = "---:") -> str:
    """A table whose first column is text; the others are aligned right, as figures are, or as told."""
    rule = ["---", *(align for _ in header[1:])]
    lines = [header, rule, *([_inline(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _value(value: Value) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if value == 0 or 1e-3 <= abs(value) < 1e3:
        return f"{value:.4f}"
    return f"{value:,.1f}" if 1e3 <= abs(value) < 1e9 else f"{value:.3e}"


def _clean(text: str) -> str:
    """Text without what markdown cannot hold: control characters, lone surrogates, foreign line ends."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").encode("utf-8", "replace").decode()
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "\N{REPLACEMENT CHARACTER}", text)


def _inline(text: str) -> str:
    """Text on one line in which nothing is markup: CommonMark lets a backslash escape any punctuation."""
    line = " ".join(_clean(text).split())
    # An underscore inside a word, as in val_bpb, is never markup; escaping it would only spoil the raw text.
    return re.sub(r"[\\`*\[\]<>|~&!#$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", line)


def _item(text: str) -> str:
    """Inline text at the start of a block, where also `-`, `+`, `=` and `1.` would be markup."""
    return re.sub(r"^(\d*)([-+=.)])", r"\1\\\2", _inline(text))


def _fenced(language: str, text: str) -> str:
    """A code block with a fence longer than any run of backticks in the text."""
    text = _clean(text)
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(what)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _has_text_keys(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def _list(data: Mapping[str, Any], name: str) -> list[Any]:
    items = data.get(name, [])
    _require(isinstance(items, list), f"{name} must be a list")
    return list(items)


def _exactly(item: Any, name: str, *keys: str) -> dict[str, Any]:
    _require(isinstance(item, dict) and item.keys() == set(keys), f"{name} must hold {' and '.join(keys)}")
    return dict(item)

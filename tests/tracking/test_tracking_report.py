import json
import math
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from nanochat.errors import DataError
from nanochat.tracking.plots import plot_curves
from nanochat.tracking.report import (
    MISSING,
    STAGES,
    Plot,
    Sample,
    Section,
    read_sections,
    render_report,
    write_section,
)

# Any text a person or a model can write, with more of what markdown takes for markup than chance would give.
MARKUP = [
    "|",
    "`",
    "```",
    "\n",
    "\n\n",
    "# ",
    "- ",
    "1. ",
    "<b>",
    "</details>",
    "&amp;",
    "\\",
    "\\|",
    "_",
    "*",
    "~",
]
MARKUP += ["[x](y)", "![", "<!--", "---", "===", "    ", "\t", "$", "> "]
readable = st.characters(exclude_categories=("Cc", "Cs"))
hostile = st.lists(st.one_of(st.sampled_from(MARKUP), st.text(readable, max_size=5)), max_size=8).map("".join)
named = hostile.filter(lambda text: text.strip() != "")

ENVIRONMENT = {"python": "3.11.7", "memory_bytes": 2**34, "gpus": [{"name": "H200"}, {"name": "H200"}]}


def parse(report: Path):
    return MarkdownIt("commonmark").enable("table").parse(report.read_text())


def plain(token):
    """The text of an inline token in which nothing is markup."""
    assert {child.type for child in token.children} <= {"text"}, token.content
    return "".join(child.content for child in token.children)


def tables(tokens):
    """Every table as rows of cell texts."""
    found = []
    for index, token in enumerate(tokens):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type in ("th_open", "td_open"):
            found[-1][-1].append(plain(tokens[index + 1]))
    return found


def headings(tokens):
    return [plain(tokens[index + 1]) for index, token in enumerate(tokens) if token.type == "heading_open"]


def fences(tokens, language):
    return [token.content for token in tokens if token.type == "fence" and token.info == language]


def one_line(text):
    return " ".join(text.split())


@pytest.fixture
def full_report(tmp_path):
    plot_curves(tmp_path / "base_loss.png", {"loss": ([0, 1], [2.0, 1.0])}, title="t", xlabel="x", ylabel="y")
    write_section(tmp_path, "eval", Section("Evaluation", seconds=30.0))
    write_section(tmp_path, "sft", Section("Chat", summary={"MMLU": 0.31, "loss": 1.2}, seconds=600.0))
    write_section(
        tmp_path,
        "base",
        Section(
            "Base training",
            figures={"Parameters": 12_345_678, "Validation bits per byte": 0.9876, "Device": "CPU"},
            config={"depth": 4, "optimizer": {"lr": 0.02}},
            plots=[Plot("base_loss.png", "Training loss"), Plot("lost.png", "Lost")],
            samples=[Sample("The capital of France is", "```\nParis\n```")],
            summary={"CORE": 0.1234},
            seconds=7380.0,
            notes=["The loss spiked once."],
            environment=ENVIRONMENT,
        ),
    )
    write_section(tmp_path, "corpus", Section("Corpus", figures={"Documents": 1000}))
    return render_report(tmp_path, "my_first_run")


def test_a_report_shows_every_stage_in_the_order_of_the_pipeline(full_report):
    tokens = parse(full_report)
    assert headings(tokens) == [
        "nanochat report: my_first_run",
        *("Environment", "Summary", "Wall clock"),
        *("Corpus", "Base training", "Chat", "Evaluation"),
    ]
    environment, summary, clock, corpus, base = tables(tokens)
    assert environment[1:] == [
        ["Python", "3.11.7"],
        ["Memory", "16.0 GiB"],
        ["GPUs", "2 \N{MULTIPLICATION SIGN} name H200"],
    ]
    assert summary == [
        ["Metric", "BASE", "SFT"],
        ["CORE", "0.1234", MISSING],
        ["MMLU", MISSING, "0.3100"],
        ["loss", MISSING, "1.2000"],
    ]
    assert clock[1:] == [
        ["Corpus", MISSING],
        ["Base training", "2 h 03 min"],
        ["Chat", "10 min 00 s"],
        ["Evaluation", "30.0 s"],
        ["Total", "2 h 13 min"],
    ]
    assert corpus[1:] == [["Documents", "1,000"]]
    assert base[1:] == [
        ["Parameters", "12,345,678"],
        ["Validation bits per byte", "0.9876"],
        ["Device", "CPU"],
    ]
    assert fences(tokens, "text") == ["The capital of France is\n", "```\nParis\n```\n"]
    assert json.loads(fences(tokens, "json")[0]) == {"depth": 4, "optimizer": {"lr": 0.02}}
    text = full_report.read_text()
    assert "![Training loss](base_loss.png)" in text
    assert "(Lost: lost.png is missing)" in text
    assert "- The loss spiked once." in text


def test_the_same_sections_give_the_same_report(full_report):
    before = full_report.read_bytes()
    assert render_report(full_report.parent, "my_first_run").read_bytes() == before


def test_a_stage_that_ran_again_replaces_its_section(tmp_path):
    write_section(tmp_path, "base", Section("Old", environment=ENVIRONMENT))
    write_section(tmp_path, "base", Section("New", environment=ENVIRONMENT))
    assert headings(parse(render_report(tmp_path, "a")))[-1] == "New"


def test_without_a_recorded_environment_this_machine_is_described(tmp_path):
    write_section(tmp_path, "corpus", Section("Corpus"))
    rows = tables(parse(render_report(tmp_path, "a")))[0]
    assert {"CPU", "Memory", "Python"} <= {row[0] for row in rows}


def test_the_environment_shown_first_is_where_the_last_model_was_trained(tmp_path):
    for stage in ("corpus", "base", "sft", "eval"):
        write_section(tmp_path, stage, Section(stage, environment={"container": f"{stage}.sif"}))
    assert tables(parse(render_report(tmp_path, "a")))[0][1:] == [["Container", "sft.sif"]]


@settings(max_examples=80, deadline=None)
@given(run=hostile, title=named, label=hostile, value=hostile, note=hostile, caption=hostile, text=hostile)
def test_no_text_can_break_a_report(run, title, label, value, note, caption, text):
    section = Section(
        title,
        figures={label: value},
        config={"prompt": text},
        plots=[Plot("lost.png", caption)],
        samples=[Sample(text, value)],
        summary={label: value},
        seconds=1.0,
        notes=[note],
        environment={"container": text},
    )
    with tempfile.TemporaryDirectory() as folder:
        write_section(Path(folder), "base", section)
        tokens = parse(render_report(Path(folder), run))
    shown = one_line(title)
    assert headings(tokens) == [
        one_line(f"nanochat report: {run}"),
        *("Environment", "Summary", "Wall clock", shown),
    ]
    row = [one_line(label), one_line(value)]
    assert tables(tokens) == [
        [["What", "Value"], ["Container", one_line(text)]],
        [["Metric", "BASE"], row],
        [["Stage", "Time"], [shown, "1.00 s"], ["Total", "1.00 s"]],
        [["Figure", "Value"], row],
    ]
    assert fences(tokens, "text") == [text + "\n", value + "\n"]
    assert json.loads(fences(tokens, "json")[0]) == {"prompt": text}
    html = "".join(token.content for token in tokens if token.type == "html_block").split("\n")
    assert [line for line in html if line] == [
        *("<details><summary>Configuration</summary>", "</details>"),
        *("<details><summary>Where it ran</summary>", "</details>"),
    ]
    (item,) = [index for index, token in enumerate(tokens) if token.type == "list_item_open"]
    if one_line(note):
        assert plain(tokens[item + 2]) == one_line(note)


def test_control_characters_and_broken_unicode_from_a_model_are_shown_as_unknown(tmp_path):
    sample = Sample("a\x1b[31mb", "c\ud800d\r\ne\0")
    write_section(tmp_path, "base", Section("Base", samples=[sample], environment=ENVIRONMENT))
    report = render_report(tmp_path, "a")
    assert fences(parse(report), "text") == ["a\ufffd[31mb\n", "c?d\ne\ufffd\n"]


@settings(max_examples=50, deadline=None)
@given(
    title=named,
    figures=st.dictionaries(
        hostile, st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False), hostile)
    ),
    seconds=st.none() | st.floats(min_value=0, max_value=1e9),
    notes=st.lists(hostile, max_size=3),
    samples=st.lists(st.builds(Sample, hostile, hostile), max_size=3),
)
def test_a_section_is_read_back_as_it_was_written_in_its_order(title, figures, seconds, notes, samples):
    section = Section(title, figures=figures, seconds=seconds, notes=notes, samples=samples)
    with tempfile.TemporaryDirectory() as folder:
        write_section(Path(folder), "base", section)
        found = read_sections(Path(folder))["base"]
    assert found == section
    assert list(found.figures) == list(figures)


def test_a_figure_that_is_not_finite_is_reported_and_not_an_error(tmp_path):
    write_section(tmp_path, "base", Section("Base", figures={"loss": math.nan}, environment=ENVIRONMENT))
    assert tables(parse(render_report(tmp_path, "a")))[-1][1:] == [["loss", "NaN"]]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("not json", "damaged"),
        ("[]", "a section must be an object"),
        ("{}", "title must be a text"),
        ('{"title": " "}', "title must be a text"),
        ('{"title": "a", "figure": {}}', "unknown: figure"),
        ('{"title": "a", "figures": {"x": [1]}}', "figures must hold numbers or texts"),
        ('{"title": "a", "summary": []}', "summary must map labels to values"),
        (
            '{"title": "a", "plots": [{"file": "../x.png", "caption": ""}]}',
            "name files in the report's folder",
        ),
        ('{"title": "a", "plots": [{"file": "x.png"}]}', "plots must hold file and caption"),
        ('{"title": "a", "samples": [{"prompt": 1, "text": ""}]}', "samples must hold texts"),
        ('{"title": "a", "samples": {}}', "samples must be a list"),
        ('{"title": "a", "notes": "text"}', "notes must be a list of str"),
        ('{"title": "a", "seconds": -1}', "seconds must be a duration"),
        ('{"title": "a", "config": 1}', "config must be an object"),
    ],
)
def test_a_damaged_section_is_named_with_what_is_wrong_and_its_fix(tmp_path, content, why):
    (tmp_path / "sections").mkdir()
    (tmp_path / "sections" / "base.json").write_text(content)
    with pytest.raises(DataError, match=r"base\.json") as caught:
        render_report(tmp_path, "a")
    assert why in caught.value.what
    assert caught.value.fix == "delete it and run the stage base again"


def test_nothing_to_report_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no section"):
        render_report(tmp_path, "a")


def test_every_stage_of_the_pipeline_can_report(tmp_path):
    for stage in reversed(STAGES):
        write_section(tmp_path, stage, Section(f"Section {stage}", environment=ENVIRONMENT))
    shown = headings(parse(render_report(tmp_path, "a")))[-len(STAGES) :]
    assert shown == [f"Section {stage}" for stage in STAGES]


def test_one_section_can_compare_the_others_in_the_summary(tmp_path):
    write_section(tmp_path, "base", Section("Base", summary={"Bits per byte": 1.4}))
    write_section(tmp_path, "mid", Section("Mid"))
    compared = {"base": {"arithmetic": "0 %"}, "mid": {"arithmetic": "97 %"}, "sft": {"arithmetic": "99 %"}}
    write_section(tmp_path, "eval", Section("Evaluation", compared=compared))
    summary = tables(parse(render_report(tmp_path, "run")))[1]
    assert summary == [
        ["Metric", "BASE", "MID", "SFT"],
        ["Bits per byte", "1.4000", MISSING, MISSING],
        ["arithmetic", "0 %", "97 %", "99 %"],
    ]


def test_the_report_tells_gpu_hours_and_at_a_price_what_they_cost(tmp_path):
    write_section(tmp_path, "tokenize", Section("Tokens", seconds=1800))
    write_section(tmp_path, "base", Section("Base", seconds=5400, gpus=8))
    write_section(tmp_path, "sft", Section("SFT", seconds=900, gpus=8))
    without = tables(parse(render_report(tmp_path, "run")))[-1]
    assert without[0] == ["Stage", "Time", "GPU hours"]
    priced = tables(parse(render_report(tmp_path, "run", gpu_hour_price=2.5)))[-1]
    assert priced == [
        ["Stage", "Time", "GPU hours", "Cost at 2.5 per GPU hour"],
        ["Tokens", "30 min 00 s", "0.00", "0.00"],
        ["Base", "1 h 30 min", "12.00", "30.00"],
        ["SFT", "15 min 00 s", "2.00", "5.00"],
        ["Total", "2 h 15 min", "14.00", "35.00"],
    ]


def test_without_a_gpu_no_gpu_hours_are_shown(tmp_path):
    write_section(tmp_path, "base", Section("Base", seconds=60))
    assert tables(parse(render_report(tmp_path, "run", gpu_hour_price=2.5)))[-1][0] == ["Stage", "Time"]

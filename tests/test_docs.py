"""The documentation keeps its word: links lead somewhere, commands exist, what is made from the code is current."""

import functools
import re
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import tyro

from nanochat.cli import main
from nanochat.commands import COMMANDS
from nanochat.errors import ExitCode, NanochatError

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [page for page in [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))] if page.is_file()]
GENERATOR = runpy.run_path(str(DOCS / "generate_reference.py"))

LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(?:sh|bash|shell|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchor(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def command_lines() -> list[tuple[str, list[str]]]:
    """Every call of nanochat in a fenced shell block, as page and arguments, with variables as plain words."""
    found = []
    for page in PAGES:
        for block in FENCE.findall(page.read_text(encoding="utf-8")):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if "-m" in words and "nanochat" in words:
                    found.append((page_id(page), words[words.index("nanochat") + 1 :]))
                elif words[:1] == ["nanochat"]:
                    found.append((page_id(page), words[1:]))
    return found


def parse(run: Callable[..., None], arguments: list[str]) -> None:
    """Parse a command's flags, settings and their checks included, without running it."""

    @functools.wraps(run)
    def nothing(*_: Any, **__: Any) -> None:
        return None

    tyro.cli(nothing, args=arguments)


def spelled(flag: Any) -> str:
    """How help shows a flag; what is known by its place, by its choices, its type or its name."""
    if not flag.positional:
        return f"--{flag.name.replace('_', '-')}"
    if get_origin(flag.type) is Literal:
        return ",".join(get_args(flag.type))
    return "PATH" if flag.type is Path else flag.name.upper()


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_link_leads_to_a_file_and_its_heading(page: Path) -> None:
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for link in LINK.findall(prose):
        if link.startswith(("https://", "http://")):
            continue
        path, _, fragment = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page_id(page)} links to {link}"
        if fragment:
            headings = map(anchor, HEADING.findall(target.read_text(encoding="utf-8")))
            assert fragment in headings, f"{page_id(page)} links to {link}"


def test_the_pages_show_commands() -> None:
    assert len(command_lines()) > 10


@pytest.mark.parametrize(("page", "arguments"), command_lines(), ids=lambda value: str(value)[:60])
def test_every_command_shown_exists_and_its_flags_parse(page: str, arguments: list[str]) -> None:
    arguments = arguments[1:] if arguments[:1] == ["--"] else arguments
    if arguments[:1] == ["--help"] or arguments[1:] == ["--help"]:
        return
    name = next((name for length in (2, 1) if (name := " ".join(arguments[:length])) in COMMANDS), None)
    assert name is not None, f"{page} shows nanochat {' '.join(arguments)}"
    try:
        parse(COMMANDS[name], arguments[len(name.split()) :])
    except SystemExit as stop:
        pytest.fail(f"{page}: nanochat {' '.join(arguments)} does not parse ({stop.code})")


def test_a_wrong_flag_would_be_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(COMMANDS["train base"], ["--detph", "4"])
    with pytest.raises(NanochatError):
        parse(COMMANDS["train base"], ["--num-steps", "0"])
    assert "--depth" in "".join(capsys.readouterr())


def test_the_command_reference_is_current() -> None:
    page: Path = GENERATOR["PAGE"]
    current = page.read_text(encoding="utf-8") == GENERATOR["render"]()
    assert current, "docs/reference/commands.md is out of date; run: python docs/generate_reference.py"


@pytest.mark.parametrize("command", list(COMMANDS))
def test_every_flag_in_the_reference_is_one_the_command_takes(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    help_text = capsys.readouterr().out
    for flag in GENERATOR["flag_names"](COMMANDS[command]):
        assert flag.meaning, f"{flag.name} of {command} has no description"
        assert re.search(rf"(?<![\w-]){spelled(flag)}(?![\w-])", help_text), f"{command} has no {spelled(flag)}"


def test_the_table_of_exit_codes_is_the_enum() -> None:
    text = (DOCS / "reference" / "exit-codes.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \|", text, re.MULTILINE)
    assert [(int(code), name) for code, name in rows] == [(code.value, code.name) for code in ExitCode]


def test_every_variable_the_code_reads_is_documented() -> None:
    page = (DOCS / "reference" / "environment-variables.md").read_text(encoding="utf-8")
    named = re.compile(
        r"\"((?:NANOCHAT|WANDB|SLURM|OMP|MPL|TIKTOKEN|DATA_GYM|TORCHELASTIC|APPTAINER|SINGULARITY)_?[A-Z_]+)\""
    )
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "src" / "nanochat").rglob("*.py"))
    variables = set(named.findall(source)) | set(re.findall(r"environ\.get\(\"(\w+)\"", source))
    assert variables >= {"NANOCHAT_BASE_DIR", "OMP_NUM_THREADS", "WANDB_MODE", "RANK"}
    assert [name for name in sorted(variables) if f"`{name}`" not in page] == []


def test_every_path_of_the_workspace_is_documented() -> None:
    page = (DOCS / "reference" / "workspace.md").read_text(encoding="utf-8")
    for name in ("base_data/", "tokens/", "tokenizer/", "report/", "wandb/", "runs/<run>/", "base_checkpoints/"):
        assert f"\n{name}" in page


def test_these_tests_do_not_wait_for_torch() -> None:
    import subprocess

    code = f"import sys, runpy; runpy.run_path({str(DOCS / 'generate_reference.py')!r}); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"

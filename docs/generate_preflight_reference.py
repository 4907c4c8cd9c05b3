"""Write `reference/preflight.md` from the code: every line that preflight and slurm/submit can print.

Run `python docs/generate_preflight_reference.py` after a change to a check; a test says when it is due. The checks are
read, not run: from Python each `Finding(…)` and each error raised, from slurm/submit each call of `problem`. What is
inserted into a text is shown by its name, as `<folder>`.
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.cluster import findings
from nanochat.cluster.findings import Finding
from nanochat.cluster.preflight import CHECKS, Check

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reference" / "preflight.md"
SUBMIT = ROOT / "slurm" / "submit"
UNNAMED = "<…>"

INTRODUCTION = """\
# Preflight

<!-- Made by docs/generate_preflight_reference.py. Do not edit: change the code and run it again. -->

`nanochat preflight` takes the flags of `nanochat speedrun`, and says in seconds, without a GPU, what would stop that
run. `slurm/submit` first makes its own checks, of what Slurm will be asked for, then runs it in the image. All that is
wrong is listed at once, each with what mends it, and nothing is submitted while anything is a PROBLEM; a note stops
nothing. Exit code 3 says that there was a problem. Quotas are seen where `quota` or `lfs` is installed, which in an
image they are not.

The commands of the pipeline make the same checks where they need what is checked, so a run that nobody checked is
stopped with the same words.
"""


@dataclass(frozen=True)
class Row:
    """A line that can be printed; `<name>` stands for what is inserted."""

    subject: str
    state: str
    text: str
    fix: str

    def fits(self, finding: Finding) -> bool:
        """Whether a finding can be this line."""
        pairs = ((self.text, finding.text), (self.fix, finding.fix))
        return finding.state in self.state and all(_pattern(shape).fullmatch(said) for shape, said in pairs)


def _pattern(shape: str) -> re.Pattern[str]:
    parts = re.split(r"(<[^<>]+>)", shape)
    return re.compile("".join(".*" if part.startswith("<") else re.escape(part) for part in parts))


def python_rows() -> list[Row]:
    """The lines of `nanochat preflight` that are not OK, in the order of its checks."""
    anything = Check("any", findings.looked_at)  # type: ignore[arg-type]
    rows = [row for check in CHECKS for run in (check.run, *check.functions) for row in _rows(check, run)]
    return list(dict.fromkeys([*rows, *_rows(anything, findings.looked_at)]))


def _rows(check: Check, run: Callable[..., Any]) -> Iterator[Row]:
    """The lines that a function, with the private functions of its module that it uses, can cause."""
    module = inspect.getmodule(run)
    pending, seen = [run], set()
    while pending:
        function = pending.pop(0)
        seen.add(function)
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
        assert isinstance(tree, ast.FunctionDef)
        yield from _rows_of(check, tree, vars(module))
        names = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id.startswith("_")]
        used = [vars(module)[name] for name in dict.fromkeys(names) if inspect.isfunction(vars(module).get(name))]
        pending += [each for each in used if each not in seen and each not in pending]


def _rows_of(check: Check, function: ast.FunctionDef, names: dict[str, Any]) -> Iterator[Row]:
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    for call in sorted(calls, key=lambda call: call.lineno):
        name = ast.unparse(call.func)
        said = [_shape(argument, function, names) for argument in call.args]
        said = [check.fix if shape == "<fix>" and check.fix else shape for shape in said]
        # What looked_at() passes on is listed where it is raised.
        if name == "Finding" and len(said) == 4 and said[1] != "<what>":
            subject = said[0] if isinstance(call.args[0], ast.Constant) else check.subject
            state = said[2] if isinstance(call.args[2], ast.Constant) else "PROBLEM or note"
            yield Row(subject, state, said[1], said[3])
        elif name in ("UsageError", "DataError", "NanochatError"):
            yield Row(check.subject, check.state, said[0], said[1] if len(said) > 1 else "")


def _shape(node: ast.expr, function: ast.FunctionDef, names: dict[str, Any]) -> str:
    """A text with `<name>` for what is inserted."""
    if isinstance(node, ast.JoinedStr):
        return "".join(_shape(part, function, names) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        node = node.value
    elif isinstance(node, ast.Name) and (assigned := _assigned(node, function)):
        return _shape(assigned, function, names)
    used = [part.id for part in ast.walk(node) if isinstance(part, ast.Name)]
    if all(name.isupper() and name in names for name in used):
        # Made of constants alone.
        return str(eval(compile(ast.Expression(node), "<constants>", "eval"), dict(names)))
    return f"<{_name(node)}>" if _name(node) else UNNAMED


def _assigned(name: ast.Name, function: ast.FunctionDef) -> ast.expr | None:
    """The text that a local name was last given before the line it stands on."""
    given: list[tuple[int, ast.expr]] = []
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and node.lineno < name.lineno:
            pairs = [(node.targets[0], node.value)]
            if isinstance(node.targets[0], ast.Tuple):
                values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value] * 99
                pairs = list(zip(node.targets[0].elts, values, strict=False))
            given += [(node.lineno, value) for target, value in pairs if ast.unparse(target) == name.id]
    last = max(given, key=lambda pair: pair[0])[1] if given else None
    return last if isinstance(last, ast.Constant | ast.JoinedStr) else None


def _name(node: ast.expr) -> str:
    """What a reader would call an expression: the last of its names."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, ast.Subscript):
        key = node.slice
        return str(key.value) if isinstance(key, ast.Constant) and isinstance(key.value, str) else _name(node.value)
    if isinstance(node, ast.Call):
        return "number" if ast.unparse(node.func) == "len" else next(filter(None, map(_name, node.args)), "")
    if isinstance(node, ast.GeneratorExp):
        return _name(node.elt)
    if isinstance(node, ast.BinOp):
        return _name(node.left) or _name(node.right)
    return ""


def submit_rows(script: str) -> list[Row]:
    """The calls `problem SUBJECT MESSAGE FIX` in slurm/submit, with `<VARIABLE>` for what is inserted."""
    quoted = r'"((?:\$\([^)]*\)|[^"\\]|\\.)*)"'
    calls = re.finditer(rf"(?<![\w-])problem\s+{quoted}\s+{quoted}\s+{quoted}", script.replace("\\\n", " "))
    rows = []
    for call in calls:
        # A text that several calls share is in a variable.
        given = {found[1]: found[2] for found in re.finditer(rf"\b([a-z_]+)={quoted}", call.string[: call.start()])}
        words = [given.get(word.removeprefix("$"), word) if word.startswith("$") else word for word in call.groups()]
        subject, text, fix = map(_shell_shape, words)
        rows.append(Row(subject, "PROBLEM", text, fix))
    return rows


def _shell_shape(word: str) -> str:
    """A double-quoted word of bash with `<name>` for what is inserted."""
    inserted = re.compile(r"(?<!\\)\$(?:\{(\w+)(?:\}|[^}']*\}|\$'[^']*'[^}]*\}|[^}]*\})|(\w+)|\(\([^)]*\)\)|\([^)]*\))")
    named = inserted.sub(lambda found: f"<{found[1] or found[2]}>" if found[1] or found[2] else UNNAMED, word)
    return re.sub(r"\\([$`\"\\])", r"\1", named)


def render() -> str:
    """The whole page."""
    blocks = [INTRODUCTION]
    if SUBMIT.is_file():
        blocks += ["## slurm/submit", _table(submit_rows(SUBMIT.read_text(encoding="utf-8")))]
    blocks += ["## nanochat preflight", _table(python_rows())]
    return "\n\n".join(block.strip() for block in blocks) + "\n"


def _table(rows: list[Row]) -> str:
    lines = [("Check", "State", "Message", "What mends it"), ("---", "---", "---", "---")]
    lines += [(row.subject, row.state, _cell(row.text), _cell(row.fix)) for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    """A text as code: an angle bracket would be HTML, and a bar would end the cell."""
    return f"`{text}`".replace("|", "\\|") if text else "–"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8", newline="\n")

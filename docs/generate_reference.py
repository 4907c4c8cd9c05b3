"""Write `reference/commands.md` from the commands themselves: their signatures, docstrings and settings.

Run `python docs/generate_reference.py` after a change to a command or a setting; a test says when it is due. The
page is made from the code, not from the output of `--help`, which depends on the terminal and on tyro's version.
"""

import ast
import dataclasses
import inspect
import textwrap
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from tyro.conf import OmitArgPrefixes

from nanochat.commands import COMMANDS

PAGE = Path(__file__).parent / "reference" / "commands.md"

INTRODUCTION = """\
# Commands

<!-- Made by docs/generate_reference.py. Do not edit: change the code and run it again. -->

`nanochat COMMAND [flags]`. Every flag takes one value unless its type says otherwise. A dash as default means that
the value is derived, as the flag's description says. `nanochat COMMAND --help` shows the same in the terminal.

These work with every command: `--help`, and `--debug`, which adds the traceback to an error. `nanochat --version`
prints the version, the commit, torch's version and the image.
"""


def render() -> str:
    """The whole page."""
    settings: dict[type, list[str]] = {}
    blocks = [INTRODUCTION, _table_of_contents()]
    for name, run in COMMANDS.items():
        blocks.append(_command(name, run))
        for parameter in _parameters(run):
            if isinstance(parameter.type, type) and dataclasses.is_dataclass(parameter.type):
                settings.setdefault(parameter.type, []).append(f"[nanochat {name}](#{_anchor(name)})")
    for kind, users in settings.items():
        rows = [_row(flag) for flag in _fields(kind)]
        blocks.append(
            f"## {kind.__name__}\n\n{_prose(kind)}\n\nFlags of {', '.join(dict.fromkeys(users))}.\n\n{_table(rows)}"
        )
    return "\n\n".join(block.strip() for block in blocks) + "\n"


@dataclasses.dataclass(frozen=True)
class Flag:
    """One parameter of a command, or one field of its settings."""

    name: str
    type: Any
    default: Any
    meaning: str
    positional: bool = False
    prefix: str = ""


def flag_names(run: Callable[..., None]) -> list[Flag]:
    """The flags of a command, those of its settings included."""
    return [
        flag
        for parameter in _parameters(run)
        for flag in (_settings(parameter) if dataclasses.is_dataclass(parameter.type) else [parameter])
    ]


def _settings(parameter: Flag) -> list[Flag]:
    return [dataclasses.replace(flag, name=f"{parameter.prefix}{flag.name}") for flag in _fields(parameter.type)]


def _parameters(run: Callable[..., None]) -> Iterator[Flag]:
    hints, annotations = get_type_hints(run), get_type_hints(run, include_extras=True)
    meanings = _argument_docs(run)
    for name, parameter in inspect.signature(run).parameters.items():
        if _is_group(hints[name]):
            inside = get_type_hints(hints[name], include_extras=True)
            for flag in _fields(hints[name]):
                yield dataclasses.replace(flag, prefix=_prefix(flag.name, inside[flag.name]))
            continue
        positional = parameter.kind is inspect.Parameter.POSITIONAL_ONLY
        prefix = _prefix(name, annotations[name])
        yield Flag(name, hints[name], parameter.default, meanings.get(name, ""), positional, prefix)


def _is_group(kind: Any) -> bool:
    """Whether it is settings that hold other settings: their own flags stand as if they were the command's."""
    return dataclasses.is_dataclass(kind) and any(map(dataclasses.is_dataclass, get_type_hints(kind).values()))


def _prefix(name: str, annotation: Any) -> str:
    """What stands before the flags of settings: their parameter's name, unless tyro is told otherwise."""
    marks = getattr(annotation, "__metadata__", ())
    if any(mark in marks for mark in OmitArgPrefixes[int].__metadata__):
        return ""
    renamed = [mark.name for mark in marks if getattr(mark, "name", None)]
    return f"{(renamed or [name])[0]}."


def _fields(kind: Any) -> list[Flag]:
    """The fields of a dataclass with the docstrings that stand below them, there or in a class it inherits from."""
    meanings: dict[str, str] = {}
    for owner in reversed([owner for owner in kind.__mro__ if dataclasses.is_dataclass(owner)]):
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, below in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
                meanings[field.target.id] = " ".join(str(ast.literal_eval(below.value)).split())
    hints = get_type_hints(kind)
    return [
        Flag(field.name, hints[field.name], field.default, meanings.get(field.name, ""))
        for field in dataclasses.fields(kind)
    ]


def _argument_docs(run: Callable[..., None]) -> dict[str, str]:
    """The lines below `Args:` of a docstring, by parameter."""
    meanings: dict[str, str] = {}
    name = ""
    for line in inspect.cleandoc(run.__doc__ or "").partition("\nArgs:\n")[2].splitlines():
        if line.startswith("     "):
            meanings[name] += f" {line.strip()}"
        elif line.startswith("    "):
            name, _, meaning = line.strip().partition(": ")
            meanings[name] = meaning
    return meanings


def _command(name: str, run: Callable[..., None]) -> str:
    parameters = list(_parameters(run))
    own = [parameter for parameter in parameters if not dataclasses.is_dataclass(parameter.type)]
    shared = [parameter for parameter in parameters if parameter not in own]
    usage = " ".join(["nanochat", name, *(_place(flag) for flag in own if flag.positional)])
    blocks = [f"## nanochat {name}", _prose(run), f"```text\n{usage}{' [flags]' if parameters else ''}\n```"]
    if own:
        blocks.append(_table([_row(flag) for flag in own]))
    if shared:
        links = [
            f"[{settings.type.__name__}](#{settings.type.__name__.lower()})"
            + (f", each after `--{settings.prefix}`" if settings.prefix else "")
            for settings in shared
        ]
        blocks.append(f"And the flags of {'; of '.join(links)}.")
    return "\n\n".join(blocks)


def _place(flag: Flag) -> str:
    """A parameter without a flag, as usage shows it."""
    named = flag.name.upper() + (" ..." if get_origin(flag.type) is tuple else "")
    return named if flag.default is inspect.Parameter.empty else f"[{named}]"


def _prose(documented: Any) -> str:
    return inspect.cleandoc(documented.__doc__ or "").partition("\nArgs:\n")[0].strip()


def _row(flag: Flag) -> tuple[str, str, str, str]:
    kebab = flag.name.replace("_", "-")
    spelled = flag.name.upper() if flag.positional else f"--{kebab}"
    if flag.type is bool:
        spelled = f"{spelled}` `--no-{kebab}"
    return f"`{spelled}`", _type(flag.type), _default(flag.default), flag.meaning.replace("|", "\\|")


def _type(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(kind))
    if get_origin(kind) is tuple:
        return f"any of {_type(get_args(kind)[0])}"
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(_type(option) for option in get_args(kind) if option is not type(None))
    return {bool: "switch", int: "whole number", float: "number", str: "text", Path: "path"}[kind]


def _default(value: Any) -> str:
    if value is inspect.Parameter.empty or value is dataclasses.MISSING:
        return "required"
    if value is None or value in ("", ()):
        return "–"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"`{value:_}`" if isinstance(value, int) and value >= 10_000 else f"`{value}`"


def _table(rows: list[tuple[str, str, str, str]]) -> str:
    lines = [("Flag", "Type", "Default", "Meaning"), ("---", "---", "---", "---"), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _table_of_contents() -> str:
    return "\n".join(
        f"- [nanochat {name}](#{_anchor(name)}): {_prose(run).splitlines()[0]}" for name, run in COMMANDS.items()
    )


def _anchor(name: str) -> str:
    return f"nanochat {name}".replace(" ", "-")


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8", newline="\n")

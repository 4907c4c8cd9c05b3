"""The objects of the standard library as the library tasks see them, and which are set aside for their tests."""

import functools
import re
from collections.abc import Set
from dataclasses import dataclass
from typing import Literal

from nanochat.corpus.standard_library import (
    COMPILED_MODULES,
    PUBLIC_MODULE_NAMES,
    DescribedObject,
    described_objects,
    read_modules,
)
from nanochat.tasks.splits import split_by_key
from nanochat.tasks.task import Split

ObjectKind = Literal["module", "class", "function", "method"]

MAX_SUMMARY_CHARACTERS = 200
# An abbreviation's full stop ends no sentence.
SENTENCE_END = re.compile(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)\s+(?=[A-Z])")
SIGNATURE = re.compile(r"[\w.]+\(|.*->|>>>|.* = ")


@dataclass(frozen=True)
class LibraryObject:
    """A public object of the standard library.

    Attributes:
        name: the name people use, `os.path.join`.
        kind: what it is, `None` for an attribute or where its documentation does not tell.
        module: the module it belongs to; `None` for a module and for what is built in.
        summary: what its documentation says first, in whole sentences; empty if those are too long or not prose.
    """

    name: str
    kind: ObjectKind | None
    module: str | None
    summary: str


@functools.cache
def documented_objects() -> tuple[tuple[DescribedObject, ...], frozenset[str]]:
    """All objects with a documentation string, and the names of all modules. A process's first call takes seconds."""
    modules = list(read_modules())
    names = {*COMPILED_MODULES, *(module.name for module in modules)} - {"builtins"}
    return tuple(described_objects(modules)), frozenset(PUBLIC_MODULE_NAMES.get(name, name) for name in names)


@functools.cache
def library_objects() -> tuple[LibraryObject, ...]:
    """Every documented object with a public name."""
    described, modules = documented_objects()
    classes = {item.name for item in described if item.title.startswith("class ")}
    return tuple(
        LibraryObject(item.name, _kind(item, modules, classes), _module(item.name, modules), summary(item.prose))
        for item in described
        if not any(part.startswith("_") for part in item.name.split("."))
    )


def split_objects(split: Split) -> list[LibraryObject]:
    """The objects of one split, the same for all library tasks: what one is examined with, no other explains."""
    return split_by_key(library_objects(), lambda item: item.name, split)


def summary(prose: str) -> str:
    """The first sentences of a documentation string, at most MAX_SUMMARY_CHARACTERS; empty if there are none."""
    paragraphs = (" ".join(paragraph.split()) for paragraph in prose.split("\n\n"))
    paragraph = next((text for text in paragraphs if not SIGNATURE.match(text)), "")
    if not paragraph or paragraph.endswith((":", ",", ";")):
        return ""
    text = ""
    for sentence in SENTENCE_END.split(paragraph):
        longer = f"{text} {sentence}".strip()
        if len(longer) > MAX_SUMMARY_CHARACTERS:
            break
        text = longer
    return text if not text or text.endswith((".", "!", "?")) else f"{text}."


def _module(name: str, modules: Set[str]) -> str | None:
    parts = name.split(".")
    parents = (".".join(parts[:length]) for length in range(len(parts) - 1, 0, -1))
    return None if name in modules else next((parent for parent in parents if parent in modules), None)


def _kind(item: DescribedObject, modules: Set[str], classes: Set[str]) -> ObjectKind | None:
    if item.title.startswith("module "):
        return "module"
    if item.title.startswith("class "):
        return "class"
    if item.title == item.name:
        return None  # No signature: an attribute, or something of C that says too little of itself.
    parent = item.name.rpartition(".")[0]
    if parent in classes:
        return "method"
    return "function" if not parent or parent in modules else None

"""The built-in corpus: about ten megabytes of real text that every machine with Python already has.

It lets the whole recipe run where nothing can be downloaded, and it is the same for every user of one
Python build: no text depends on the hash seed, the locale, the order of the file system or what is installed.
Web text would make a better model; no web text can be promised to be there.
"""

import platform
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nanochat.corpus.shards import text_digest, write_corpus
from nanochat.corpus.standard_library import described_objects, read_modules, reference_topics, tidy
from nanochat.errors import UsageError

Kind = Literal["topic", "docstring", "source"]

# Raised when the same Python would give other text than before, so that an old corpus is told from a new one.
RECIPE = 1
SHUFFLE_SEED = 1337
VALIDATION_SEED = 0
ROWS_PER_SHARD = 2048
VALIDATION_ROWS = 500

# A paragraph this long that stands twice is a licence, boilerplate or a copy. Shorter ones are idiom.
REPEATED_PARAGRAPH_CHARACTERS = 160
# A Python stripped of its sources gives far less, and nothing can be learnt from that.
FEWEST_DOCUMENTS = 1000


@dataclass(frozen=True)
class BuiltinText:
    """One document and the kind of text it is."""

    kind: Kind
    text: str


def builtin_texts() -> Iterator[BuiltinText]:
    """Yield the documents of the built-in corpus in their fixed, shuffled order.

    A `topic` is a section of Python's reference; a `docstring` is an object's name and signature followed by
    what its documentation says; a `source` is a few definitions of one file without documentation strings.
    No paragraph of REPEATED_PARAGRAPH_CHARACTERS or more stands in two documents, so none can be both trained
    and validated on.

    Raises:
        UsageError: this Python comes without its standard library's sources.
    """
    documents = list(_distinct(_documents()))
    if len(documents) < FEWEST_DOCUMENTS:
        raise UsageError(
            f"this Python ships only {len(documents)} documents of its standard library",
            "use a Python with sources, or your own text: nanochat data local FOLDER",
        )
    documents.sort(key=lambda document: text_digest(document.text, SHUFFLE_SEED))
    yield from documents


def build_builtin_corpus(folder: Path) -> dict[str, Any]:
    """Write the built-in corpus to `folder`, or keep it if it is there. Takes seconds on one core.

    Returns:
        The manifest; `details` has documents and UTF-8 bytes per kind.

    Raises:
        UsageError: `folder` holds something else, or this Python comes without sources.
    """
    details: dict[str, Any] = {"kinds": {}}
    return write_corpus(
        folder,
        _counted_texts(details["kinds"]),
        rows_per_shard=ROWS_PER_SHARD,
        source={
            "name": "builtin",
            "recipe": RECIPE,
            "python": f"{platform.python_implementation()} {platform.python_version()}",
            "build": " ".join(platform.python_build()),
        },
        validation_rows=VALIDATION_ROWS,
        seed=VALIDATION_SEED,
        details=details,
    )


def _counted_texts(kinds: dict[str, dict[str, int]]) -> Iterator[str]:
    for document in builtin_texts():
        counts = kinds.setdefault(document.kind, {"documents": 0, "text_bytes": 0})
        counts["documents"] += 1
        counts["text_bytes"] += len(document.text.encode())
        yield document.text


def _documents() -> Iterator[tuple[Kind, str, str]]:
    """Every (kind, heading, body), repetitions included; what stands twice stays where it comes first."""
    for heading, body in reference_topics():
        yield "topic", heading, body
    modules = list(read_modules())
    for described in described_objects(modules):
        yield "docstring", described.title, described.prose
    for module in modules:
        for source in module.sources:
            yield "source", f"# {module.file}", source


def _distinct(documents: Iterable[tuple[Kind, str, str]]) -> Iterator[BuiltinText]:
    """Leave out long paragraphs that stood before, and documents of which a third did.

    A document with holes teaches wrong things, and one that follows a pattern seen before teaches nothing:
    the hundred code pages differ in one word. Short documents may share a sentence: each has its own object.
    """
    seen: set[str] = set()
    texts: set[str] = set()
    for kind, heading, body in documents:
        kept: list[str] = []
        repeated = 0
        for paragraph in body.split("\n\n"):
            key = " ".join(paragraph.split())
            if key in seen:
                repeated += len(paragraph)
            if key not in seen or len(key) < REPEATED_PARAGRAPH_CHARACTERS:
                seen.add(key)
                kept.append(paragraph)
        prose = tidy("\n\n".join(kept))
        text = f"{heading}\n\n{prose}" if heading else prose
        is_new = repeated * 3 < len(body) or len(body) < REPEATED_PARAGRAPH_CHARACTERS
        if prose and is_new and text not in texts:
            texts.add(text)
            yield BuiltinText(kind, text)

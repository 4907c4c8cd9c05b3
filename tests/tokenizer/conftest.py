"""One small tokenizer for the whole room, trained on code, several scripts and text made to be awkward."""

import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer
from nanochat.tokenizer.evaluate import SAMPLES
from nanochat.tokenizer.train import train_tokenizer

# U+017F, the long s, and U+0131, the dotless i, have a different case than they look like.
CASE_TRAPS = ["I'S", "it'\u017f", "don'T", "\u0131'lL", "İ'VE", "we'rE", "'d", "'K", "''s", "ß'S", "ﬁ'M"]
SPACES = " \t\n\r\x0b\x0c\x1c\x1f\x85\u00a0\u1680\u2003\u2028\u2029\u202f\u3000\u200b\ufeff"
EMOJI = [
    "👩\u200d👩\u200d👧\u200d👦",
    "🏳\ufe0f\u200d🌈",
    "🇮🇸🇧🇹",
    "👍🏽",
    "e\u0301\u0323",
    "क्षि",
    "한\u1100\u1161",
]


def code_slices() -> list[str]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = "".join((folder / name).read_text() for name in ("argparse.py", "typing.py", "tarfile.py", "ast.py"))
    return [text[start : start + 3000] for start in range(0, len(text), 3000)]


def hostile_strings(count: int, seed: int) -> list[str]:
    """Texts on which tokenizers have been seen to disagree, the same ones every time."""
    source = random.Random(seed)
    code = code_slices()

    def any_character() -> str:
        plane = source.choice([0x80, 0x250, 0x3000, 0x10000, 0x20000, 0x110000])
        code_point = source.randrange(plane)
        return chr(code_point) if not 0xD800 <= code_point < 0xE000 else "\ufffd"

    def slice_of_code() -> str:
        text = source.choice(code)
        start = source.randrange(len(text))
        return text[start : start + source.randrange(1, 80)]

    makers = [
        lambda: "".join(any_character() for _ in range(source.randrange(1, 12))),
        slice_of_code,
        lambda: source.choice(CASE_TRAPS),
        lambda: "".join(source.choice(SPACES) for _ in range(source.randrange(1, 9))),
        lambda: source.choice(EMOJI),
        lambda: source.choice(SPECIAL_TOKENS)[: source.choice([None, None, -1, -2])],
        lambda: "".join(chr(source.choice([*range(32), 0x7F, *range(0x80, 0xA0)])) for _ in range(4)),
        lambda: source.choice([any_character(), " ", "a", "-", "\n", "9"]) * source.randrange(1, 40),
        lambda: str(source.randrange(10**9)) + source.choice(["", "٣", "Ⅷ", "½", "९९९"]),
    ]
    return ["".join(source.choice(makers)() for _ in range(source.randrange(1, 6))) for _ in range(count)]


def texts() -> Iterator[str]:
    yield from code_slices()
    yield from SAMPLES.values()
    yield from hostile_strings(1000, seed=1)


@pytest.fixture(scope="session")
def hostile() -> list[str]:
    """10,000 strings, and some very long runs of one character."""
    return hostile_strings(10_000, seed=0) + [character * 20_000 for character in "a -\n9é中\u200d'"]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(texts(), vocab_size=3000, max_chars=10_000_000, corpus_fingerprint="c0ffee")


@pytest.fixture(scope="session")
def bytes_only() -> Tokenizer:
    """One token per byte: every text has as many tokens as bytes."""
    return Tokenizer([bytes([value]) for value in range(256)], r"\s+|\S+", digit_group=1)

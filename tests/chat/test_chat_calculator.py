"""The calculator is Python's arithmetic, as far as it goes, and nothing can make it fail, run away or do more."""

import math
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.chat.calculator import MAX_CHARS, calculate

NUMBERS = st.one_of(
    st.integers(0, 99_999).map(str),
    st.integers(0, 10**9).map("{:,}".format),
    st.floats(0, 1e6, allow_subnormal=False).map(lambda value: f"{value:.3f}"),
)


def combine(parts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    spaces = st.sampled_from(["", " "])
    return st.one_of(
        st.tuples(parts, spaces, st.sampled_from(["+", "-", "*", "/", "//", "%"]), spaces, parts).map("".join),
        st.tuples(parts, st.just("**"), st.sampled_from(["0", "1", "2", "3", "-1"])).map("".join),
        parts.map("({})".format),
        parts.map("-{}".format),
    )


EXPRESSIONS = st.recursive(NUMBERS, combine, max_leaves=6)


@given(EXPRESSIONS)
def test_the_result_is_pythons(expression: str) -> None:
    try:
        expected = eval(expression.replace(",", ""))
    except ArithmeticError:
        assert calculate(expression) is None
        return
    found = calculate(expression)
    if len(expression) > MAX_CHARS or isinstance(expected, complex) or not math.isfinite(expected):
        assert found is None
    elif isinstance(expected, int) and expected.bit_length() <= 500:
        assert found == str(expected)
    elif found is not None:
        assert math.isclose(float(found), expected, rel_tol=1e-11)
    else:
        # Only what is too large on the way may be refused.
        assert "**" in expression or abs(expected) > 1e100


@given(st.text(st.characters(exclude_characters='\\"\n'), max_size=40), st.text("aab,", min_size=1, max_size=2))
def test_counting_in_a_text_is_pythons(text: str, searched: str) -> None:
    found = calculate(f'"{text}".count("{searched}")')
    assert found in (str(text.count(searched)), None)
    if text.isprintable():
        assert found is not None


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("6*7", "42"),
        ("48/2", "24"),
        ("1/3", "0.333333333333"),
        ("0.1 + 0.2", "0.3"),
        ("1,234,567 + 1", "1234568"),
        (" -(5 + 2**10) % 7 ", "0"),
        ("7 // 2 * 1_000", "3000"),
        ("2**100", "1267650600228229401496703205376"),
        ("10**22 / 1", "1e+22"),
        ("'strawberry'.count('r') + 1", "4"),
        ('"1,000".count(",")', "1"),
    ],
)
def test_examples(expression: str, result: str) -> None:
    assert calculate(expression) == result


HOSTILE = [
    "",
    " ",
    "9**9**9",
    "9**9**9**9",
    "-9**99999999",
    "(9**99)**99",
    "'a'*10**9",
    "'a'.count('a')**10**9",
    "1" * 4000,
    "9" * MAX_CHARS,
    "(" * 200 + "1" + ")" * 200,
    "(" * 127 + "1" + ")" * 127,
    "((((-" * 50,
    "-" * 255 + "1",
    "1+" * 127 + "1",
    "1**" * 80 + "1",
    "1\x00",
    "\x00",
    "1/0",
    "0**-1",
    "1e999",
    "1e308*10",
    "(-8)**0.5",
    "1j",
    "True",
    "x",
    "1 if 1 else 2",
    "1or 2",
    "1,2",
    "1,23",
    "[1][0]",
    "(1).__class__",
    "'a'.upper()",
    "'a'.count",
    "'a'.count()",
    "'a'.count('a', 1)",
    "'a'.count(*'a')",
    "'a'.count(sub='a')",
    "''.join('a').count('a')",
    "'a'.count('a').count('a')",
    "'\\d'.count('d')",
    "f'{1}'.count('1')",
    "b'a'.count(b'a')",
    "1;2",
    "1\n2",
    "__import__('os').system('true')",
    "open('x')",
    "\ud800",
    "'\ud800'.count('a')",
    "٣+٣",
]


@pytest.mark.parametrize("expression", HOSTILE, ids=lambda text: ascii(text)[:30])
def test_hostile_expressions_take_no_time_and_give_no_long_result(expression: str) -> None:
    start = time.perf_counter()
    result = calculate(expression)
    assert time.perf_counter() - start < 0.5
    assert result is None or len(result) < 200


def test_what_is_not_arithmetic_is_refused() -> None:
    arithmetic = {"9" * MAX_CHARS, "(" * 127 + "1" + ")" * 127, "-" * 255 + "1", "1+" * 127 + "1", "1**" * 80 + "1"}
    assert [text for text in HOSTILE if text not in arithmetic and calculate(text) is not None] == []


@given(st.text("0123456789.,+-*/%()eE_ '\"acount\x00\n", max_size=80) | st.text(max_size=80))
def test_it_never_raises(expression: str) -> None:
    result = calculate(expression)
    assert result is None or len(result) < 200


def test_nothing_is_printed_whatever_the_parser_thinks_of_it() -> None:
    """Python's parser warns on stderr, which a chat would show."""
    code = f"from nanochat.chat.calculator import calculate\nfor text in {HOSTILE!r}: calculate(text)"
    result = subprocess.run([sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == result.stderr == ""

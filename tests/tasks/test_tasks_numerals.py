"""Numbers are recognised however people write them."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.tasks.numerals import last_number, numbers_in


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("It is 42.", ["42"]),
        ("$1,000 and $ 7", ["1000", "7"]),
        ("-5, −5, $-5 and -$5", ["-5", "-5", "-5", "-5"]),
        ("12-7 = 5", ["12", "7", "5"]),
        (".50 is 0.5", ["0.5", "0.5"]),
        ("1, 2, 3 or 1,2,3", ["1", "2", "3", "1", "2", "3"]),
        ("none", []),
    ],
)
def test_numbers_in_prose_are_found(text: str, numbers: list[str]) -> None:
    assert numbers_in(text) == [Decimal(number) for number in numbers]


@given(st.integers(-(10**12), 10**12), st.sampled_from(["{}", "{}.", "{:,}", "{}.0", "so: {:,}!", "{} apples"]))
def test_a_number_is_the_same_in_every_spelling(number: int, form: str) -> None:
    assert last_number(form.format(number)) == number


@given(st.text())
def test_no_text_is_too_strange(text: str) -> None:
    assert last_number(text) is None or isinstance(last_number(text), Decimal)

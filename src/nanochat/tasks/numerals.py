"""Numbers as people write them in answers: `$1,000`, `42.`, `-3.50`."""

import re
from decimal import Decimal

# A minus after a letter, digit or bracket is a subtraction or a hyphen.
NUMERAL = re.compile(r"((?<![\w)])[-−]\s?)?(?:\$\s?(-?))?((?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")


def numbers_in(text: str) -> list[Decimal]:
    """Every number in a text, in order; those of equal value are equal however they are written."""
    return [
        Decimal(digits.replace(",", "")) * (-1 if minus or late_minus else 1)
        for minus, late_minus, digits in NUMERAL.findall(text)
    ]


def last_number(text: str) -> Decimal | None:
    """The number that a text ends on, `None` if it has none."""
    return next(reversed(numbers_in(text)), None)

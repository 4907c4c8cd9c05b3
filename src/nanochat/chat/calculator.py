"""The python tool: arithmetic, and counting in a text, by walking the syntax tree. Nothing is executed.

    48/2                        24
    1,234 * -(5 + 2**10)        -1269786
    "strawberry".count("r")     3

Bounds instead of a timer, so that it works in any thread: the length of the expression bounds the parser's work, and no
number is computed that could be large.
"""

import ast
import math
import operator
import re
from collections.abc import Callable

MAX_CHARS = 256
MAX_BITS = 512
# Significant digits of a result with a fraction: 0.1 + 0.2 is 0.3, as people and data sets write it.
FLOAT_DIGITS = 12

# A text in quotes, or a comma between thousands. The texts are matched so that commas in them are left alone.
TEXT_OR_COMMA = re.compile(r"""("[^"\\\n]*"|'[^'\\\n]*')|(?<=[0-9]),(?=[0-9]{3}(?![0-9]))""")
# What may stand outside of texts. It also keeps the parser from warning on stderr, as it does at `1or 2`.
ALLOWED = re.compile(r"(?:[0-9 +\-*/%().eE_]|\.count)*")

Number = int | float

BINARY: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
UNARY: dict[type[ast.unaryop], Callable[[Number], Number]] = {ast.USub: operator.neg, ast.UAdd: operator.pos}


class _RefusedError(Exception):
    """The expression is not arithmetic, or too large."""


def calculate(expression: str) -> str | None:
    """Evaluate an expression.

    Returns:
        The result as text, a whole number without a point; None if it is not arithmetic, has no finite real result, or
        would be too large.
    """
    if len(expression) > MAX_CHARS:
        return None
    source = TEXT_OR_COMMA.sub(lambda match: match[1] or "", expression).strip()
    if not ALLOWED.fullmatch(TEXT_OR_COMMA.sub("", source)):
        return None
    try:
        return _format(_evaluate(ast.parse(source, mode="eval").body))
    except (_RefusedError, ArithmeticError, SyntaxError, ValueError, RecursionError, MemoryError):
        # The last two are how the parser says that it is nested too deeply, ValueError how it says NUL.
        return None


def _evaluate(node: ast.expr) -> Number:
    match node:
        # `type`, as True is an int as well.
        case ast.Constant(value=value) if type(value) in (int, float):
            return _bounded(value)
        case ast.UnaryOp(op=sign, operand=operand) if type(sign) in UNARY:
            return _bounded(UNARY[type(sign)](_evaluate(operand)))
        case ast.BinOp(op=operation, left=left, right=right) if type(operation) in BINARY:
            first, second = _evaluate(left), _evaluate(right)
            if isinstance(operation, ast.Pow) and isinstance(first, int) and isinstance(second, int):
                _check_power(first, second)
            return _bounded(BINARY[type(operation)](first, second))
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=str(text)), attr="count"),
            args=[ast.Constant(value=str(searched))],
            keywords=[],
        ):
            return text.count(searched)
        case _:
            raise _RefusedError


def _check_power(base: int, exponent: int) -> None:
    """Refuse an integer power before it is computed. The other operations at most double the bits."""
    if base.bit_length() * exponent > MAX_BITS:
        raise _RefusedError


def _bounded(value: object) -> Number:
    # A power of a negative number may be complex.
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise _RefusedError
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise _RefusedError
    return value


def _format(value: Number) -> str:
    # Up to 2⁵³ every whole number is a float of its own.
    if isinstance(value, float) and value.is_integer() and abs(value) <= 2**53:
        value = int(value)
    return str(value) if isinstance(value, int) else f"{value:.{FLOAT_DIGITS}g}"

"""Do two short formulas have the same value? Text in, bool out; nothing of the text is ever run.

The way there: one normal form for both texts; equal strings are the same; tuples and intervals go
element by element; fractions and integers by simple rules; what is left is parsed into sympy by a
walker that knows a dozen operations and refuses huge numbers, and the difference is simplified.
Simplification may still take forever: whoever calls this needs a time limit from outside.
"""

from __future__ import annotations

import ast
import functools
import logging
import re
from fractions import Fraction
from typing import Any

import sympy
from pylatexenc.latex2text import LatexNodes2Text
from sympy.parsing import sympy_parser as parser

logging.getLogger("pylatexenc").setLevel(logging.ERROR)  # it warns of each malformed answer

MAX_LATEX_LEN = 1000  # characters; longer LaTeX is left unconverted
MAX_FORMULA_LEN = 500  # characters of both sides together; longer ones are not parsed
MAX_POWER_BITS = 65_536  # of a number raised to a power
MAX_EXPONENT = 200  # of anything else raised to an integer
MAX_FACTORIAL = 2000
MAX_DECIMAL_EXPONENT = 1000  # of a numeral like 1e5

_UNITS = tuple(
    re.compile(f"{unit}(?:es)?s? *(?:\\^[0-9]+)?")
    for unit in "degree cm centimeter meter mile second minute hour day week month year foot feet "
    "inch yard".split()
)
_MILLIONS = (("million", "*10^6"), ("billion", "*10^9"), ("trillion", "*10^12"))
_GLYPHS = str.maketrans({"√": "sqrt", "π": "pi", "∞": "inf", "∪": "U", "·": "*", "×": "*"})
_THOUSANDS_COMMA = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?:$|[^0-9]))")
_TUPLE = re.compile(r"[(\[]([^()\[\]]+)[)\]]")
# As published: one character more after either number, so 3x/2 is a fraction as well.
_FRACTION = re.compile(r"-?[0-9]+.?/0*[1-9][0-9]*.?\n?")
# So short that sympy's rounding of decimals cannot hide a difference: see `_as_rational`.
_SHORT_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]{0,6})(?:\.[0-9]{1,7}|/[1-9][0-9]{0,6})?")
_STEEP_POWER = re.compile(r"\^[({]|\^[0-9]+\^|\^[0-9][0-9]")
_NAMES = ("sqrt", "ln", "pi", "I", "frac")  # what a word may mean besides a product of letters


class TooLarge(ValueError):
    """The answer asks for more arithmetic than any right answer would: no verdict."""


class _NotAFormula(Exception):
    """The text means nothing the walker knows."""


def unwrap_text(text: str) -> str:
    r"""Content of a string that is one `\text{...}`; else the string."""
    inside = len(text) > len("\\text{}") and text.startswith("\\text{") and text.endswith("}")
    return text[len("\\text{") : -1] if inside else text


def same_value(answer: str, truth: str) -> bool:
    """Whether the answer is worth the truth. Raises TooLarge for explosive or endless formulas.

    An integer equals only an integer, a fraction only the same fraction, order and brackets count.
    """
    answer, truth = normal_form(answer), normal_form(truth)
    if answer == truth:
        return True
    if not answer:
        return False
    answers, truths = _elements(answer), _elements(truth)
    if len(answers) != len(truths):
        return False
    if len(truths) > 1 and (answer[0], answer[-1]) != (truth[0], truth[-1]):
        return False
    return all(map(_same_element, answers, truths))


def normal_form(text: str) -> str:
    """The text without LaTeX, units, currency, spaces, braces, capitals and thousands commas."""
    text = unwrap_text(text)
    for ornament in ("\\$", "$", "\\%", "%"):
        text = text.replace(ornament, "")
    text = text.replace(" or ", " , ").replace(" and ", " , ")
    for word, factor in _MILLIONS:
        text = text.replace(word, factor)
    for unit in _UNITS:
        text = unit.sub("", text)
    text = re.sub(r"\^ *\\circ", "", text)
    if text.startswith("{") and text.endswith("}"):
        text = text[1:-1]
    text = re.sub(r",\\! *", "", text)
    if (integer := _near_integer(text)) is not None:
        text = str(integer)
    if "\\" in text and len(text) <= MAX_LATEX_LEN:
        text = _latex_to_text(text)
    text = re.sub(r"- *", "-", text)
    text = re.sub(r"([0-9]) +([0-9])", r"\1+\2", text)  # 7 3/4 is 7+3/4
    text = re.sub(r"[ {}]", "", text).lower()
    integer = _near_integer(_drop_thousands_commas(text))
    return text if integer is None else str(integer)


def _latex_to_text(text: str) -> str:
    fractions = text.replace("\\tfrac", "\\frac").replace("\\dfrac", "\\frac")
    try:
        plain = LatexNodes2Text().latex_to_text(fractions.replace("\\frac", " \\frac"))
    except MemoryError:
        raise
    except Exception:  # malformed LaTeX raises many kinds; it is then compared as it stands
        return text
    return plain.translate(_GLYPHS).strip()


def _near_integer(text: str) -> int | None:
    """The integer that a numeral like 34, 034, 34.0 stands for; None if it is no such numeral."""
    try:
        value = float(text)
        return round(value) if abs(value - round(value)) <= 1e-7 else None
    except (ValueError, OverflowError):  # no number; infinite or NaN
        return None


def _drop_thousands_commas(text: str) -> str:
    return _THOUSANDS_COMMA.sub("", text) if "," in text else text


def _elements(text: str) -> list[str]:
    """Parts of a bracketed tuple, set or interval; anything else is one part."""
    text = _drop_thousands_commas(text)
    if match := _TUPLE.fullmatch(text):
        return match.group(1).split(",")
    return [text]


def _same_element(answer: str, truth: str) -> bool:
    if _FRACTION.fullmatch(answer) and _FRACTION.fullmatch(truth):
        return answer == truth
    integers = [_near_integer(_drop_thousands_commas(text)) is not None for text in (answer, truth)]
    if integers[0] != integers[1]:
        return False
    left, right = _as_rational(answer), _as_rational(truth)
    if left is not None and right is not None:
        return left == right
    return _same_formula(answer, truth)


def _as_rational(text: str) -> Fraction | None:
    """Exact value of a short decimal, integer or fraction; None for anything else.

    Two different values of at most 7 digits each differ by more than 1e-14 of their size, so
    comparing them exactly agrees with comparing them in double precision, as sympy does.
    """
    return Fraction(text) if _SHORT_NUMBER.fullmatch(text) else None


def _same_formula(answer: str, truth: str) -> bool:
    """Whether the difference simplifies to 0. Text that is no formula equals nothing."""
    both = f"({truth})-({answer})"
    letters = {char for char in both.replace("sqrt", "").replace("frac", "") if char.isalpha()}
    if len(letters) > 2 or _STEEP_POWER.search(both):
        return False
    if len(answer) + len(truth) > MAX_FORMULA_LEN:
        raise TooLarge(f"formulas of {len(answer)} and {len(truth)} characters")
    try:
        return bool(sympy.simplify(_formula(truth) - _formula(answer)) == 0)
    except (TooLarge, MemoryError):
        raise
    except Exception:  # tokenizer, parser and sympy raise many kinds for text that is no formula
        return False


def _formula(text: str) -> Any:
    """The sympy expression that a text means. Raises TooLarge, or anything if it means nothing."""
    rules = (*parser.standard_transformations, parser.implicit_multiplication_application)
    bracketed = f"({text})".replace("^", "**")  # within brackets a line may break
    code = parser.stringify_expr(bracketed, {}, dict(_known_names()), rules)
    return _build(ast.parse(code.strip(), mode="eval").body)


@functools.cache
def _known_names() -> dict[str, Any]:
    """All that a parsed formula may name: number and symbol classes, and a few functions."""
    return (
        {name: getattr(sympy, name) for name in _NAMES}
        | _makers()
        | {
            "factorial": functools.partial(_factorial, sympy.factorial),
            "factorial2": functools.partial(_factorial, sympy.factorial2),
        }
    )


@functools.cache
def _makers() -> dict[str, Any]:
    """What the tokenizer wraps each numeral and letter in, as text: Integer('2')."""
    return {
        name: getattr(sympy, name) for name in ("Symbol", "Function", "Integer", "Rational")
    } | {
        "Float": functools.partial(_numeral, sympy.Float),
        "Number": functools.partial(_numeral, sympy.Number),
    }


def _build(node: ast.expr) -> Any:
    """Evaluate a parsed formula node by node: only what is listed here can happen."""
    match node:
        case ast.Name(id=name) if name in _known_names():
            return _known_names()[name]
        case ast.Call(func=ast.Name(id=name), args=[ast.Constant(value=value)]) if (
            name in _makers()
        ):
            return _makers()[name](value)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _known_names():
            return _known_names()[name](*map(_build, args))  # never a text: sympy would run it
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_build(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _build(operand)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _build(left) + _build(right)
        case ast.BinOp(left=left, op=ast.Sub(), right=right):
            return _build(left) - _build(right)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return _build(left) * _build(right)
        case ast.BinOp(left=left, op=ast.Div(), right=right):
            return _build(left) / _build(right)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _power(_build(left), _build(right))
    raise _NotAFormula(type(node).__name__)


def _numeral(kind: Any, text: str) -> Any:
    exponent = text.lower().partition("e")[2]
    if exponent and abs(int(exponent)) > MAX_DECIMAL_EXPONENT:
        raise TooLarge(f"a numeral with an exponent above {MAX_DECIMAL_EXPONENT}")
    return kind(text)


def _power(base: Any, exponent: Any) -> Any:
    if exponent.is_Rational and abs(exponent) > 1:
        bits = (abs(base.p) * base.q).bit_length() - 1 if base.is_Rational else 0
        if bits * abs(exponent) > MAX_POWER_BITS:
            raise TooLarge(f"a power of more than {MAX_POWER_BITS} bits")
        if not base.is_Number and abs(exponent) > MAX_EXPONENT:
            raise TooLarge(f"a formula to a power above {MAX_EXPONENT}")
    return base**exponent


def _factorial(function: Any, number: Any) -> Any:
    if number.is_number and number > MAX_FACTORIAL:
        raise TooLarge(f"factorial of a number above {MAX_FACTORIAL}")
    return function(number)

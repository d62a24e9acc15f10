"""Whether two mathematical answers have the same value.

Rational answers are compared exactly. With roots, logarithms, pi or variables in them, both are
computed to 60 digits, at a few fixed values of the variables, and have to agree in 40. Every size
is known before a power is computed. Text that is no mathematics is compared as text.
"""

from collections.abc import Callable, Mapping
from decimal import (
    Context,
    Decimal,
    DivisionByZero,
    InvalidOperation,
    Overflow,
    localcontext,
)
from fractions import Fraction
from math import isqrt

from textpolicy.rewards.verifiers.extract import final_answer, last_number
from textpolicy.rewards.verifiers.grammar import (
    Apply,
    Name,
    Number,
    Several,
    Tree,
    Unreadable,
    read,
)
from textpolicy.rewards.verifiers.text import normalised

BITS = 2048
"""The largest numerator or denominator that is computed."""
_AGREE = Decimal("1e-40")
_CONTEXT = Context(
    prec=60, Emax=9999, Emin=-9999, traps=[DivisionByZero, InvalidOperation, Overflow]
)
_CONSTANTS = {
    "pi": Decimal("3.14159265358979323846264338327950288419716939937510582097494"),
    "e": Decimal("2.71828182845904523536028747135266249775724709369995957496697"),
}
_OPERATORS: dict[str, Callable[..., Decimal]] = {
    "+": Decimal.__add__,
    "-": Decimal.__sub__,
    "*": Decimal.__mul__,
    "/": Decimal.__truediv__,
    "^": Decimal.__pow__,
    "sqrt": Decimal.sqrt,
    "root": lambda degree, value: value ** (1 / degree),
    "ln": Decimal.ln,
    "log": Decimal.log10,
    "exp": Decimal.exp,
    "abs": Decimal.copy_abs,
}
# Fixed, so that equal answers always get equal rewards; of no simple relation to each other.
_POINTS = (Decimal("0.7390851332151606"), Decimal("2.2360679774997896"), Decimal("-1.3247179572"))


def math_equal(completion: str, answer: object) -> bool:
    """Whether the final answer of `completion` has the value of `answer`, a text or a number.

    Percent signs divide by 100; units in \\text{} are left out; lists without brackets are sets.
    """
    given, wanted = final_answer(completion), str(answer)
    if given is None:
        return False
    if len(wanted) > 1 and (boxed := final_answer(wanted, tags=(), number=False)):
        wanted = boxed
    try:
        right = read(wanted)
    except Unreadable:
        return bool(wanted.strip()) and normalised(given) == normalised(wanted)
    try:
        return same_value(read(given), right)
    except Unreadable:
        return False


def number_equal(completion: str, answer: float | str, *, tolerance: float = 0.0) -> bool:
    """Whether the last number of `completion` is within `tolerance` (relative) of `answer`."""
    try:
        given = number_in(completion)
        wanted = exact(read(str(answer)))
    except Unreadable:
        return False
    if given is None or wanted is None:
        return False
    return abs(given - wanted) <= Fraction(tolerance) * abs(wanted)


def number_in(text: str) -> Fraction | None:
    """The exact value of the final answer or last number of a text; None where there is none."""
    for found in (final_answer(text), last_number(text)):
        try:
            value = exact(read(found)) if found is not None else None
        except Unreadable:
            continue
        if value is not None:
            return value
    return None


def same_value(left: Tree, right: Tree) -> bool:
    """Whether two trees stand for the same value; raises `Unreadable` if one is out of bounds."""
    if isinstance(left, Several) or isinstance(right, Several):
        return isinstance(left, Several) and isinstance(right, Several) and _same_items(left, right)
    values = exact(left), exact(right)
    if values[0] is not None and values[1] is not None:
        return values[0] == values[1]
    return _agree(left, right)


def exact(tree: Tree) -> Fraction | None:
    """The value as a fraction; None where it is none, as for roots of 2 and for variables."""
    if isinstance(tree, Number):
        return _bounded(tree.value)
    if isinstance(tree, Name):
        return None
    if isinstance(tree, Several):
        raise Unreadable("a list where a number should be")
    operands = [exact(operand) for operand in tree.operands]
    known = [operand for operand in operands if operand is not None]
    if len(known) < len(operands):
        return None
    return _exact_apply(tree.operator, *known)


def _exact_apply(operator: str, left: Fraction, right: Fraction = Fraction(0)) -> Fraction | None:
    match operator:
        case "+":
            return _bounded(left + right)
        case "-":
            return _bounded(left - right)
        case "*":
            return _bounded(left * right)
        case "/":
            if right == 0:
                raise Unreadable("division by zero")
            return _bounded(left / right)
        case "^":
            return _exact_power(left, right)
        case "sqrt":
            return _exact_root(left)
        case "abs":
            return abs(left)
        case _:
            return None


def _exact_power(base: Fraction, exponent: Fraction) -> Fraction | None:
    if exponent.denominator != 1:
        return _exact_root(base) if exponent == Fraction(1, 2) else None
    size = max(base.numerator.bit_length(), base.denominator.bit_length())
    if abs(exponent) * size > BITS:
        raise Unreadable("a power too large")
    if base == 0 and exponent < 0:
        raise Unreadable("division by zero")
    return base**exponent.numerator


def _exact_root(value: Fraction) -> Fraction | None:
    if value < 0:
        raise Unreadable("a root of a negative number")
    top, bottom = isqrt(value.numerator), isqrt(value.denominator)
    is_square = (top * top, bottom * bottom) == (value.numerator, value.denominator)
    return Fraction(top, bottom) if is_square else None


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > BITS:
        raise Unreadable("a number too large")
    return value


def _same_items(left: Several, right: Several) -> bool:
    if left.brackets != right.brackets or len(left.items) != len(right.items):
        return False
    if left.brackets != "{}":
        return all(map(same_value, left.items, right.items))
    rest = list(right.items)
    for item in left.items:
        match = next((other for other in rest if same_value(item, other)), None)
        if match is None:
            return False
        rest.remove(match)
    return True


def _agree(left: Tree, right: Tree) -> bool:
    names = sorted(_names(left) | _names(right))
    compared = 0
    with localcontext(_CONTEXT):
        for shift, point in enumerate(_POINTS):
            values = {name: point + shift + place for place, name in enumerate(names, start=1)}
            pair = _defined(left, values), _defined(right, values)
            if pair == (None, None):
                continue
            if pair[0] is None or pair[1] is None:
                return False
            if abs(pair[0] - pair[1]) > _AGREE * max(abs(pair[0]), abs(pair[1])):
                return False
            compared += 1
    if not compared:
        raise Unreadable("no value anywhere")
    return True


def _names(tree: Tree) -> set[str]:
    if isinstance(tree, Name):
        return {tree.name} - set(_CONSTANTS)
    operands = tree.operands if isinstance(tree, Apply) else ()
    return {name for operand in operands for name in _names(operand)}


def _defined(tree: Tree, values: Mapping[str, Decimal]) -> Decimal | None:
    try:
        value = _numeric(tree, values)
        return value if value.is_finite() else None
    except (DivisionByZero, InvalidOperation, Overflow):
        return None


def _numeric(tree: Tree, values: Mapping[str, Decimal]) -> Decimal:
    """In the current decimal context, whose precision and exponents bound every operation."""
    if isinstance(tree, Number):
        return Decimal(tree.value.numerator) / Decimal(tree.value.denominator)
    if isinstance(tree, Name):
        return _CONSTANTS.get(tree.name) or values[tree.name]
    if isinstance(tree, Several):
        raise Unreadable("a list where a number should be")
    operands = [_numeric(operand, values) for operand in tree.operands]
    if tree.operator not in _OPERATORS:
        raise Unreadable(f"no operator {tree.operator!r}")
    return _OPERATORS[tree.operator](*operands)

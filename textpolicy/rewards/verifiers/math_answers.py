"""Compare the values of mathematical answers.

Rational answers are compared exactly. Answers with roots, logarithms, pi or variables are computed
to 60 digits at a few fixed values of the variables, and must agree in 40 digits. The size of a
power is known before the power is computed. Text that is not mathematics is compared as text.
"""

from collections.abc import Callable, Mapping
from decimal import Context, Decimal, DivisionByZero, InvalidOperation, Overflow, localcontext
from fractions import Fraction
from math import isqrt

from textpolicy.rewards.verifiers.answer_in_text import final_answer, last_number
from textpolicy.rewards.verifiers.math_grammar import (
    AnswerTree,
    ListNode,
    OperationNode,
    UnreadableAnswerError,
    parse_answer,
)
from textpolicy.rewards.verifiers.text_answers import normalise_text

_MAX_BITS = 2048
"""The most bits of a numerator or denominator that is computed."""
_TOLERANCE = Decimal("1e-40")
_UNDEFINED = (DivisionByZero, InvalidOperation, Overflow)
_DECIMALS = Context(prec=60, Emax=9999, Emin=-9999, traps=[*_UNDEFINED])
_CONSTANTS = {
    "pi": Decimal("3.14159265358979323846264338327950288419716939937510582097494"),
    "e": Decimal("2.71828182845904523536028747135266249775724709369995957496697"),
}
_DECIMAL_OPERATORS: dict[str, Callable[..., Decimal]] = {
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
# Fixed, so that equal answers always get equal rewards, and without a simple relation.
_VARIABLE_VALUES = tuple(
    map(Decimal, ("0.7390851332151606", "2.2360679774997896", "-1.3247179572"))
)


def math_equal(completion: str, answer: object) -> bool:
    """Return whether the final answer of `completion` has the value of `answer`, a text or number.

    A percent sign divides by 100. Units in \\text{} are ignored. A list without brackets is a set.
    """
    given, wanted = final_answer(completion), str(answer)
    if given is None:
        return False
    if len(wanted) > 1 and (boxed := final_answer(wanted, tags=(), number=False)):
        wanted = boxed
    try:
        right = parse_answer(wanted)
    except UnreadableAnswerError:
        return bool(wanted.strip()) and normalise_text(given) == normalise_text(wanted)
    try:
        return _same_value(parse_answer(given), right)
    except UnreadableAnswerError:
        return False


def number_equal(completion: str, answer: float | str, *, tolerance: float = 0.0) -> bool:
    """Return whether the number in `completion` is within a relative `tolerance` of `answer`."""
    try:
        given, wanted = number_in(completion), _exact_value(parse_answer(str(answer)))
    except UnreadableAnswerError:
        return False
    if given is None or wanted is None:
        return False
    return abs(given - wanted) <= Fraction(tolerance) * abs(wanted)


def number_in(text: str) -> Fraction | None:
    """Return the exact value of a text's final answer, else of its last number, else None."""
    for answer in (final_answer(text), last_number(text)):
        try:
            value = _exact_value(parse_answer(answer)) if answer is not None else None
        except UnreadableAnswerError:
            continue
        if value is not None:
            return value
    return None


def _same_value(left: AnswerTree, right: AnswerTree) -> bool:
    """Return whether two trees have the same value, or raise `UnreadableAnswerError`."""
    if isinstance(left, ListNode) and isinstance(right, ListNode):
        return _same_items(left, right)
    if isinstance(left, ListNode) or isinstance(right, ListNode):
        return False
    values = _exact_value(left), _exact_value(right)
    if None not in values:
        return values[0] == values[1]
    return _agree_numerically(left, right)


def _same_items(left: ListNode, right: ListNode) -> bool:
    if left.brackets != right.brackets or len(left.items) != len(right.items):
        return False
    if left.brackets != "{}":
        return all(map(_same_value, left.items, right.items))
    rest = list(right.items)
    for item in left.items:
        match = next((other for other in rest if _same_value(item, other)), None)
        if match is None:
            return False
        rest.remove(match)
    return True


def _exact_value(tree: AnswerTree) -> Fraction | None:
    """Return the value as a fraction, or None if it is irrational or depends on variables."""
    if isinstance(tree, ListNode):
        raise UnreadableAnswerError("expected a number, found a list")
    if isinstance(tree, str):
        return None
    if isinstance(tree, Fraction):
        return _bounded(tree)
    operands = [_exact_value(operand) for operand in tree.operands]
    known = [operand for operand in operands if operand is not None]
    if len(known) < len(operands) or tree.operator not in _EXACT_OPERATORS:
        return None
    try:
        value = _EXACT_OPERATORS[tree.operator](*known)
    except ZeroDivisionError as error:
        raise UnreadableAnswerError("division by zero") from error
    return None if value is None else _bounded(value)


def _exact_power(base: Fraction, exponent: Fraction) -> Fraction | None:
    if exponent.denominator != 1:
        return _exact_root(base) if exponent == Fraction(1, 2) else None
    size = max(base.numerator.bit_length(), base.denominator.bit_length())
    if abs(exponent) * size > _MAX_BITS:
        raise UnreadableAnswerError("a power is too large")
    return base**exponent.numerator


def _exact_root(value: Fraction) -> Fraction | None:
    if value < 0:
        raise UnreadableAnswerError("a root of a negative number")
    top, bottom = isqrt(value.numerator), isqrt(value.denominator)
    is_square = (top * top, bottom * bottom) == (value.numerator, value.denominator)
    return Fraction(top, bottom) if is_square else None


_EXACT_OPERATORS: dict[str, Callable[..., Fraction | None]] = {
    "+": Fraction.__add__,
    "-": Fraction.__sub__,
    "*": Fraction.__mul__,
    "/": Fraction.__truediv__,
    "^": _exact_power,
    "sqrt": _exact_root,
    "abs": Fraction.__abs__,
}


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > _MAX_BITS:
        raise UnreadableAnswerError("a number is too large")
    return value


def _agree_numerically(left: AnswerTree, right: AnswerTree) -> bool:
    names = sorted(_variables(left) | _variables(right))
    with localcontext(_DECIMALS):
        pairs: list[tuple[Decimal | None, Decimal | None]] = []
        for shift, point in enumerate(_VARIABLE_VALUES):
            values = {name: point + shift + place for place, name in enumerate(names, start=1)}
            pairs.append((_decimal_value(left, values), _decimal_value(right, values)))
        if not any(value is not None for pair in pairs for value in pair):
            raise UnreadableAnswerError("neither answer has a value")
        return all(_is_close(*pair) for pair in pairs)


def _is_close(left: Decimal | None, right: Decimal | None) -> bool:
    if left is None or right is None:
        return left is right
    return abs(left - right) <= _TOLERANCE * max(abs(left), abs(right))


def _variables(tree: AnswerTree) -> set[str]:
    if isinstance(tree, str):
        return {tree} - set(_CONSTANTS)
    operands = tree.operands if isinstance(tree, OperationNode) else ()
    return {name for operand in operands for name in _variables(operand)}


def _decimal_value(tree: AnswerTree, values: Mapping[str, Decimal]) -> Decimal | None:
    """Return the value at these values of the variables, or None if it is undefined."""
    try:
        value = _compute_decimal(tree, values)
        return value if value.is_finite() else None
    except _UNDEFINED:
        return None


def _compute_decimal(tree: AnswerTree, values: Mapping[str, Decimal]) -> Decimal:
    """Return the value in the current decimal context, which bounds precision and exponents."""
    if isinstance(tree, Fraction):
        return Decimal(tree.numerator) / Decimal(tree.denominator)
    if isinstance(tree, str):
        return _CONSTANTS.get(tree) or values[tree]
    if isinstance(tree, ListNode):
        raise UnreadableAnswerError("expected a number, found a list")
    operands = [_compute_decimal(operand, values) for operand in tree.operands]
    if tree.operator not in _DECIMAL_OPERATORS:
        raise UnreadableAnswerError(f"no operator {tree.operator!r}")
    return _DECIMAL_OPERATORS[tree.operator](*operands)

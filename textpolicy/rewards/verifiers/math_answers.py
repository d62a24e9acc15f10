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

from textpolicy.rewards.verifiers.answer_in_text import final_answer, last_number
from textpolicy.rewards.verifiers.math_grammar import (
    AnswerTree,
    ListNode,
    NameNode,
    NumberNode,
    OperationNode,
    UnreadableAnswerError,
    parse_answer,
)
from textpolicy.rewards.verifiers.text_answers import normalised

_MAX_BITS = 2048
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
        right = parse_answer(wanted)
    except UnreadableAnswerError:
        return bool(wanted.strip()) and normalised(given) == normalised(wanted)
    try:
        return same_value(parse_answer(given), right)
    except UnreadableAnswerError:
        return False


def number_equal(completion: str, answer: float | str, *, tolerance: float = 0.0) -> bool:
    """Whether the last number of `completion` is within `tolerance` (relative) of `answer`."""
    try:
        given = number_in(completion)
        wanted = exact(parse_answer(str(answer)))
    except UnreadableAnswerError:
        return False
    if given is None or wanted is None:
        return False
    return abs(given - wanted) <= Fraction(tolerance) * abs(wanted)


def number_in(text: str) -> Fraction | None:
    """The exact value of the final answer or last number of a text; None where there is none."""
    for found in (final_answer(text), last_number(text)):
        try:
            value = exact(parse_answer(found)) if found is not None else None
        except UnreadableAnswerError:
            continue
        if value is not None:
            return value
    return None


def same_value(left: AnswerTree, right: AnswerTree) -> bool:
    """Whether two trees stand for the same value; raises `UnreadableAnswerError` if not."""
    if isinstance(left, ListNode) or isinstance(right, ListNode):
        return (
            isinstance(left, ListNode) and isinstance(right, ListNode) and _same_items(left, right)
        )
    values = exact(left), exact(right)
    if values[0] is not None and values[1] is not None:
        return values[0] == values[1]
    return _agree(left, right)


def exact(tree: AnswerTree) -> Fraction | None:
    """The value as a fraction; None where it is none, as for roots of 2 and for variables."""
    if isinstance(tree, NumberNode):
        return _bounded(tree.value)
    if isinstance(tree, NameNode):
        return None
    if isinstance(tree, ListNode):
        raise UnreadableAnswerError("a list where a number should be")
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
                raise UnreadableAnswerError("division by zero")
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
    if abs(exponent) * size > _MAX_BITS:
        raise UnreadableAnswerError("a power too large")
    if base == 0 and exponent < 0:
        raise UnreadableAnswerError("division by zero")
    return base**exponent.numerator


def _exact_root(value: Fraction) -> Fraction | None:
    if value < 0:
        raise UnreadableAnswerError("a root of a negative number")
    top, bottom = isqrt(value.numerator), isqrt(value.denominator)
    is_square = (top * top, bottom * bottom) == (value.numerator, value.denominator)
    return Fraction(top, bottom) if is_square else None


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > _MAX_BITS:
        raise UnreadableAnswerError("a number too large")
    return value


def _same_items(left: ListNode, right: ListNode) -> bool:
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


def _agree(left: AnswerTree, right: AnswerTree) -> bool:
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
        raise UnreadableAnswerError("no value anywhere")
    return True


def _names(tree: AnswerTree) -> set[str]:
    if isinstance(tree, NameNode):
        return {tree.name} - set(_CONSTANTS)
    operands = tree.operands if isinstance(tree, OperationNode) else ()
    return {name for operand in operands for name in _names(operand)}


def _defined(tree: AnswerTree, values: Mapping[str, Decimal]) -> Decimal | None:
    try:
        value = _numeric(tree, values)
        return value if value.is_finite() else None
    except (DivisionByZero, InvalidOperation, Overflow):
        return None


def _numeric(tree: AnswerTree, values: Mapping[str, Decimal]) -> Decimal:
    """In the current decimal context, whose precision and exponents bound every operation."""
    if isinstance(tree, NumberNode):
        return Decimal(tree.value.numerator) / Decimal(tree.value.denominator)
    if isinstance(tree, NameNode):
        return _CONSTANTS.get(tree.name) or values[tree.name]
    if isinstance(tree, ListNode):
        raise UnreadableAnswerError("a list where a number should be")
    operands = [_numeric(operand, values) for operand in tree.operands]
    if tree.operator not in _OPERATORS:
        raise UnreadableAnswerError(f"no operator {tree.operator!r}")
    return _OPERATORS[tree.operator](*operands)

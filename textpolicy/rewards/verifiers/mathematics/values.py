"""Compute the value of an answer's tree, and compare the values of two trees.

Values are fractions as long as they can be, and balls of 60 digits where they are irrational. What
60 digits cannot tell apart is computed again to 150 digits. Expressions with variables are compared
at fractions that are drawn from the text of both, so that nobody can write an answer that is right
only there. The size of a power or a factorial is known before it is computed.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal, DecimalException, localcontext
from fractions import Fraction
from math import isqrt

from textpolicy.rewards.verifiers.mathematics import precision as precise
from textpolicy.rewards.verifiers.mathematics.answer_tree import (
    AnswerTree,
    OperationNode,
    operation,
    parts_of,
)
from textpolicy.rewards.verifiers.mathematics.precision import Ball, Number, UndefinedValueError
from textpolicy.rewards.verifiers.mathematics.tokens import UnreadableAnswerError

_MAX_BITS = 16_384
"""The most bits of a numerator or denominator that is kept as a fraction."""
_DIGITS = (60, 150)
_AGREEING = 100
CONSTANTS = frozenset({"pi", "e", "i", "infinity", "emptyset"})
_ONE = Fraction(1)
_POINTS = 16
_POSITIVE_POINTS, _NEGATIVE_POINTS = 4, 4  # the first points; later ones have signs of both kinds
_WHOLE_POINTS = 8
_WHOLE_OPERATORS = {"!", "!!", "binom"}
_UNDEFINED = (UndefinedValueError, ZeroDivisionError, DecimalException)


def same_number(left: AnswerTree, right: AnswerTree) -> bool:
    """Return whether two trees have one value wherever they are defined.

    Raise `UnreadableAnswerError` if one of them is no number, or nothing can be computed.
    """
    return all(_agreements(left, right, precise.agree))


def is_constant_ratio(left: AnswerTree, right: AnswerTree, *, positive: bool) -> bool:
    """Return whether left / right is the same number, not zero, at all values of the variables."""
    ratio = operation("/", left, right)
    points = _points(left, right)
    with localcontext(precise.decimal_context(_DIGITS[-1])):
        values = [value for point in points if (value := _value(ratio, point)) is not None]
        if len(values) < 2 or not precise.is_certainly_different(values[0], Fraction(0)):
            return False
        if positive and not precise.as_ball(values[0]).re > 0:
            return False
        return all(precise.agree(value, values[0], _AGREEING) for value in values)


def variables_in(tree: AnswerTree) -> frozenset[str]:
    """Return the names of the variables."""
    if isinstance(tree, str):
        return frozenset({tree}) - CONSTANTS
    return frozenset().union(*map(variables_in, parts_of(tree)))


def exact_value(tree: AnswerTree) -> Fraction | None:
    """Return the value as a fraction, or None if it is irrational, undefined or has variables."""
    if variables_in(tree):
        return None
    with localcontext(precise.decimal_context(_DIGITS[0])):
        value = _value(tree, {})
    return value if isinstance(value, Fraction) else None


def real_value(tree: AnswerTree) -> Number:
    """Return the real value to 150 digits, or raise `UnreadableAnswerError`."""
    if variables_in(tree):
        raise UnreadableAnswerError("expected a number, found a variable")
    with localcontext(precise.decimal_context(_DIGITS[-1])):
        value = _value(tree, {})
    if value is None or (isinstance(value, Ball) and not value.real):
        raise UnreadableAnswerError("expected a real number")
    return value


def _agreements(
    left: AnswerTree, right: AnswerTree, agree: Callable[[Number, Number, int], bool]
) -> Iterator[bool]:
    """Yield whether the values agree, first where that is cheap to see."""
    points = _points(left, right)
    defined = 0
    for digits in _DIGITS:
        with localcontext(precise.decimal_context(digits)):
            for point in points:
                values = _value(left, point), _value(right, point)
                if values[0] is None or values[1] is None:
                    yield values[0] is values[1]
                elif digits < _DIGITS[-1]:
                    yield not precise.is_certainly_different(values[0], values[1])
                    defined += 1
                else:
                    yield agree(values[0], values[1], _AGREEING)
    if not defined:
        raise UnreadableAnswerError("neither answer has a value that can be computed")


def _points(left: AnswerTree, right: AnswerTree) -> list[dict[str, Fraction]]:
    """Return values for the variables, the same for the same two trees."""
    names = sorted(variables_in(left) | variables_in(right))
    if not names:
        return [{}]
    source = hashlib.sha256(repr((left, right)).encode()).digest()
    if _has_whole_operator(left) or _has_whole_operator(right):
        return [
            {name: Fraction(2 + _draw(source, name, number) % 40) for name in names}
            for number in range(_WHOLE_POINTS)
        ]
    # Some functions want small numbers, and |x - 100| wants some beyond the constants.
    sizes = (1, 4, 4 * (1 + max(_largest_constant(left), _largest_constant(right))))
    points: list[dict[str, Fraction]] = []
    for number in range(0, _POINTS, 2):
        drawn = [
            _sign(source, name, number)
            * sizes[number // 2 % len(sizes)]
            * Fraction(_draw(source, name, number) | 1, 2**32 + 15)
            for name in names
        ]
        # The other order too, because |a - b| is b - a in one of them.
        points += [dict(zip(names, drawn, strict=True)), dict(zip(names, drawn[::-1], strict=True))]
    return points


def _sign(source: bytes, name: str, number: int) -> int:
    if number < _POSITIVE_POINTS:
        return 1
    if number < _POSITIVE_POINTS + _NEGATIVE_POINTS:
        return -1
    return 1 - 2 * (_draw(source, f"sign of {name}", number) % 2)


def _largest_constant(tree: AnswerTree) -> Fraction:
    if isinstance(tree, Fraction):
        return abs(tree)
    return max(map(_largest_constant, parts_of(tree)), default=Fraction(0))


def _draw(source: bytes, name: str, number: int) -> int:
    """Return 32 bits that depend on the two answers, the variable and the point."""
    text = source + f"{name} {number}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:4], "big")


def _has_whole_operator(tree: AnswerTree) -> bool:
    if isinstance(tree, OperationNode) and tree.operator in _WHOLE_OPERATORS and variables_in(tree):
        return True
    return any(map(_has_whole_operator, parts_of(tree)))


def _value(tree: AnswerTree, point: Mapping[str, Fraction]) -> Number | None:
    """Return the value at this point, or None if it is undefined or cannot be computed.

    With variables, what is not real is undefined, unless the answer has the imaginary unit.
    """
    try:
        return _compute(tree, point, real=bool(point) and not _has_imaginary(tree))
    except _UNDEFINED:
        return None


def _has_imaginary(tree: AnswerTree) -> bool:
    return tree == "i" or any(map(_has_imaginary, parts_of(tree)))


def _compute(tree: AnswerTree, point: Mapping[str, Fraction], real: bool) -> Number:
    if isinstance(tree, Fraction):
        return tree
    if isinstance(tree, str):
        return _named(tree, point)
    if not isinstance(tree, OperationNode):
        raise UnreadableAnswerError("expected a number, found a list or a relation")
    operands = [_compute(operand, point, real) for operand in tree.operands]
    exact = [operand for operand in operands if isinstance(operand, Fraction)]
    value = None
    if len(exact) == len(operands) and tree.operator in _EXACT_OPERATORS:
        value = _EXACT_OPERATORS[tree.operator](*exact)
    if value is None or _bits(value) > _MAX_BITS:
        value = _compute_ball(tree.operator, operands)
    if real and isinstance(value, Ball) and not value.real:
        raise UndefinedValueError("not a real number")
    return value


def _named(name: str, point: Mapping[str, Fraction]) -> Number:
    if name == "pi":
        return precise.pi()
    if name == "e":
        return precise.exponential(precise.as_ball(_ONE))
    if name == "i":
        return Ball(Decimal(0), Decimal(1), Decimal(0), False)
    if name not in point:
        raise UnreadableAnswerError(f"{name!r} has no value")
    return point[name]


def _compute_ball(operator: str, operands: list[Number]) -> Number:
    if operator not in _BALL_OPERATORS:
        raise UndefinedValueError(f"no value of {operator!r} can be computed")
    if operator in ("^", "root"):
        return _power(operator, operands)
    return _BALL_OPERATORS[operator](*map(precise.as_ball, operands))


def _power(operator: str, operands: list[Number]) -> Number:
    base, exponent = operands if operator == "^" else (operands[1], operands[0])
    if operator == "root":
        exponent = (
            1 / exponent
            if isinstance(exponent, Fraction)
            else precise.divide(precise.as_ball(_ONE), exponent)
        )
    if base == 0 and isinstance(exponent, Fraction) and exponent > 0:
        return Fraction(0)
    return precise.power(precise.as_ball(base), exponent)


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def _exact_power(base: Fraction, exponent: Fraction) -> Fraction | None:
    if exponent.denominator != 1:
        return _exact_root(exponent.denominator, _exact_power(base, Fraction(exponent.numerator)))
    if abs(exponent) * _bits(base) > _MAX_BITS:
        return None
    return base**exponent.numerator


def _exact_root(degree: Fraction | int, value: Fraction | None) -> Fraction | None:
    """Return a real root that is a fraction, or None."""
    if value is None or not 2 <= degree <= 64 or Fraction(degree).denominator != 1:
        return None
    if value < 0:
        root = _exact_root(degree, -value) if int(degree) % 2 else None
        return None if root is None else -root
    top, bottom = (_whole_root(part, int(degree)) for part in (value.numerator, value.denominator))
    root = Fraction(top, bottom)
    return root if root ** int(degree) == value else None


def _whole_root(value: int, degree: int) -> int:
    if degree == 2:
        return isqrt(value)
    # Newton's method from above, in whole numbers.
    root = 1 << -(-value.bit_length() // degree)
    while (
        root and (lower := ((degree - 1) * root + value // root ** (degree - 1)) // degree) < root
    ):
        root = lower
    return root


def _factorial(value: Fraction, step: int) -> Fraction | None:
    if value.denominator != 1 or value < 0:
        raise UndefinedValueError("the factorial of what is no natural number")
    if value * _bits(value) > _MAX_BITS * step:
        return None
    return Fraction(math.prod(range(value.numerator, 0, -step)))


def _binomial(top: Fraction, bottom: Fraction) -> Fraction | None:
    if top.denominator != 1 or bottom.denominator != 1 or top < 0:
        raise UndefinedValueError("a binomial of what is no natural number")
    if not 0 <= bottom <= top:
        return Fraction(0)
    if min(bottom, top - bottom) * _bits(top) > _MAX_BITS:
        return None
    return Fraction(math.comb(top.numerator, bottom.numerator))


def _exact_logarithm(value: Fraction, base: Fraction = Fraction(10)) -> Fraction | None:
    return Fraction(0) if value == 1 and base > 0 and base != 1 else None


_EXACT_OPERATORS: dict[str, Callable[..., Fraction | None]] = {
    "+": Fraction.__add__,
    "-": Fraction.__sub__,
    "*": Fraction.__mul__,
    "/": Fraction.__truediv__,
    "^": _exact_power,
    "sqrt": lambda value: _exact_root(2, value),
    "root": _exact_root,
    "abs": Fraction.__abs__,
    "floor": lambda value: Fraction(math.floor(value)),
    "ceil": lambda value: Fraction(math.ceil(value)),
    "!": lambda value: _factorial(value, 1),
    "!!": lambda value: _factorial(value, 2),
    "binom": _binomial,
    "ln": _exact_logarithm,
    "log": _exact_logarithm,
    "lg": _exact_logarithm,
}


def _logarithm(value: Ball, base: Ball | None = None) -> Ball:
    base = base or precise.as_ball(Fraction(10))
    if not (base.real and base.re > base.error):
        raise UndefinedValueError("the base of a logarithm is not positive")
    return precise.divide(precise.logarithm(value), precise.logarithm(base))


def _tangent(value: Ball) -> Ball:
    return precise.divide(precise.sine(value), precise.cosine(value))


def _hyperbolic(value: Ball, sign: int) -> Ball:
    up, down = precise.exponential(value), precise.exponential(precise.negative(value))
    both = precise.add(up, down) if sign > 0 else precise.subtract(up, down)
    return precise.divide(both, precise.as_ball(Fraction(2)))


def _inverse(value: Ball) -> Ball:
    return precise.divide(precise.as_ball(_ONE), value)


def _degrees(value: Ball) -> Ball:
    return precise.multiply(value, precise.divide(precise.pi(), precise.as_ball(Fraction(180))))


_BALL_OPERATORS: dict[str, Callable[..., Number]] = {
    "+": precise.add,
    "-": precise.subtract,
    "*": precise.multiply,
    "/": precise.divide,
    "^": precise.power,
    "root": precise.power,
    "sqrt": precise.square_root,
    "abs": precise.absolute,
    "floor": precise.floor,
    "ceil": lambda value: -precise.floor(precise.negative(value)),
    "ln": lambda value, base=None: _logarithm(value, base) if base else precise.logarithm(value),
    "log": _logarithm,
    "lg": _logarithm,
    "exp": precise.exponential,
    "sin": precise.sine,
    "cos": precise.cosine,
    "tan": _tangent,
    "cot": lambda value: _inverse(_tangent(value)),
    "sec": lambda value: _inverse(precise.cosine(value)),
    "csc": lambda value: _inverse(precise.sine(value)),
    "arcsin": precise.arc_sine,
    "arccos": lambda value: precise.subtract(
        _degrees(precise.as_ball(Fraction(90))), precise.arc_sine(value)
    ),
    "arctan": precise.arc_tangent,
    "sinh": lambda value: _hyperbolic(value, -1),
    "cosh": lambda value: _hyperbolic(value, 1),
    "tanh": lambda value: precise.divide(_hyperbolic(value, -1), _hyperbolic(value, 1)),
    "degree": _degrees,
}

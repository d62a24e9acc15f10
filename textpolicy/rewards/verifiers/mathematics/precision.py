"""Arithmetic of numbers with a bound on their error.

A `Ball` is a decimal number, real or complex, with a bound on its error. Every operation adds the
error of its operands and of its own rounding, so two balls that do not touch are different numbers,
whatever was cancelled on the way. The precision is that of the current decimal context.
"""

import math
from dataclasses import dataclass
from decimal import (
    Context,
    Decimal,
    DivisionByZero,
    InvalidOperation,
    Overflow,
    Underflow,
    getcontext,
    localcontext,
)
from fractions import Fraction
from functools import cache

_TRAPS = (DivisionByZero, InvalidOperation, Overflow, Underflow)
_PI_DIGITS = 260
_MAX_ANGLE_DIGITS = 25  # in front of the point of an angle whose sine is computed
_ZERO, _ONE, _TWO = Decimal(0), Decimal(1), Decimal(2)


class UndefinedValueError(ArithmeticError):
    """The expression has no value here, or none that can be computed within the bounds."""


@dataclass(frozen=True, slots=True)
class Ball:
    """A number `re + im i` that is wrong by at most `error`; `real` says that `im` is exactly 0."""

    re: Decimal
    im: Decimal
    error: Decimal
    real: bool

    @property
    def size(self) -> Decimal:
        """The absolute value of the middle."""
        return abs(self.re) if self.real else (self.re * self.re + self.im * self.im).sqrt()


Number = Fraction | Ball


def decimal_context(digits: int) -> Context:
    """Return a context in which whatever leaves its range raises an error instead of rounding."""
    return Context(prec=digits, Emax=999_999, Emin=-999_999, traps=list(_TRAPS))


def as_ball(number: Number) -> Ball:
    """Return the number rounded to the current precision."""
    if isinstance(number, Ball):
        return number
    value = Decimal(number.numerator) / Decimal(number.denominator)
    digits = max(number.numerator.bit_length(), number.denominator.bit_length())
    exact = number.denominator == 1 and digits < 3 * getcontext().prec
    return Ball(value, _ZERO, _ZERO if exact else abs(value) * _ulp(), True)


def is_certainly_different(left: Number, right: Number) -> bool:
    """Return whether the two balls do not touch."""
    if isinstance(left, Fraction) and isinstance(right, Fraction):
        return left != right
    left, right = as_ball(left), as_ball(right)
    distance = subtract(left, right)
    return distance.size > distance.error


def agree(left: Number, right: Number, digits: int) -> bool:
    """Return whether two numbers are equal as far as `digits` digits can tell, and no less."""
    if isinstance(left, Fraction) and isinstance(right, Fraction):
        return left == right
    left, right = as_ball(left), as_ball(right)
    distance = subtract(left, right)
    scale = max(left.size, right.size, min(_ONE, Decimal(10) ** (-digits // 5)))
    return distance.size <= distance.error <= scale * Decimal(10) ** -digits


def pi() -> Ball:
    """Return pi."""
    return _rounded(+_pi(), _ZERO, _ZERO, True)


def add(left: Ball, right: Ball) -> Ball:
    """Return the sum."""
    real = left.real and right.real
    return _rounded(left.re + right.re, left.im + right.im, left.error + right.error, real)


def negative(ball: Ball) -> Ball:
    """Return the number with the other sign."""
    return Ball(-ball.re, -ball.im, ball.error, ball.real)


def subtract(left: Ball, right: Ball) -> Ball:
    """Return the difference."""
    return add(left, negative(right))


def multiply(left: Ball, right: Ball) -> Ball:
    """Return the product."""
    error = left.size * right.error + right.size * left.error + left.error * right.error
    if left.real and right.real:
        return _rounded(left.re * right.re, _ZERO, error, True)
    re = left.re * right.re - left.im * right.im
    im = left.re * right.im + left.im * right.re
    return _rounded(re, im, error, False, size=left.size * right.size)


def divide(left: Ball, right: Ball) -> Ball:
    """Return the quotient."""
    return multiply(left, _inverse(right))


def _inverse(ball: Ball) -> Ball:
    least = ball.size - ball.error
    if least <= 0:
        raise UndefinedValueError("division by what may be zero")
    error = ball.error / (least * ball.size)
    if ball.real:
        return _rounded(1 / ball.re, _ZERO, error, True)
    square = ball.re * ball.re + ball.im * ball.im
    return _rounded(ball.re / square, -ball.im / square, error, False)


def square_root(ball: Ball) -> Ball:
    """Return the root with a real part that is not negative."""
    if ball.real and ball.re >= ball.error:
        root = ball.re.sqrt()
        error = ball.error / root if root else _ZERO
        return _rounded(root, _ZERO, error, True)
    if ball.real and -ball.re > ball.error:
        return _times_i(square_root(negative(ball)))
    return exponential(multiply(logarithm(ball), Ball(Decimal("0.5"), _ZERO, _ZERO, True)))


def exponential(ball: Ball) -> Ball:
    """Return e to the power of the number."""
    if ball.error > Decimal("0.1"):
        raise UndefinedValueError("the exponent is not known well enough")
    size = ball.re.exp()
    if ball.real:
        return _rounded(size, _ZERO, 2 * size * ball.error, True)
    sine, cosine = _sine_and_cosine(ball.im)
    return _rounded(size * cosine, size * sine, 2 * size * ball.error, False, size=size)


def logarithm(ball: Ball) -> Ball:
    """Return the natural logarithm; that of a negative number has the imaginary part pi."""
    least = ball.size - ball.error
    if least <= 0:
        raise UndefinedValueError("the logarithm of what may be zero")
    if ball.real and ball.re > 0:
        return _rounded(ball.re.ln(), _ZERO, ball.error / least, True, size=_ONE)
    angle = +_pi() if ball.real else _angle_of(ball).re
    return _rounded(ball.size.ln(), angle, ball.error / least, False, size=Decimal(4))


def power(base: Ball, exponent: Number) -> Ball:
    """Return the principal power, but the real root of a negative number where there is one."""
    if isinstance(exponent, Fraction):
        if exponent.denominator == 1 and abs(exponent) <= 10_000:
            return _whole_power(base, exponent.numerator)
        if base.real and base.re < 0 and exponent.denominator % 2:
            root = power(negative(base), exponent)
            return negative(root) if exponent.numerator % 2 else root
    return exponential(multiply(logarithm(base), as_ball(exponent)))


def _whole_power(base: Ball, exponent: int) -> Ball:
    if exponent < 0:
        return _inverse(_whole_power(base, -exponent))
    result = Ball(_ONE, _ZERO, _ZERO, True)
    for bit in bin(exponent)[2:]:
        result = multiply(result, result)
        if bit == "1":
            result = multiply(result, base)
    return result


def absolute(ball: Ball) -> Ball:
    """Return the absolute value."""
    return _rounded(ball.size, _ZERO, ball.error, True)


def floor(ball: Ball) -> Fraction:
    """Return the greatest whole number that is not above the number."""
    if not ball.real or abs(ball.re) > 10**30:
        raise UndefinedValueError("the whole part is not known")
    low, high = (math.floor(ball.re + shift) for shift in (-ball.error, ball.error))
    if low != high:
        raise UndefinedValueError("the whole part is not known")
    return Fraction(low)


def sine(ball: Ball) -> Ball:
    """Return the sine."""
    if ball.real:
        return _rounded(_sine_and_cosine(ball.re)[0], _ZERO, ball.error, True, size=_ONE)
    up, down = _exponentials(ball)
    return multiply(subtract(up, down), Ball(_ZERO, Decimal("-0.5"), _ZERO, False))


def cosine(ball: Ball) -> Ball:
    """Return the cosine."""
    if ball.real:
        return _rounded(_sine_and_cosine(ball.re)[1], _ZERO, ball.error, True, size=_ONE)
    up, down = _exponentials(ball)
    return multiply(add(up, down), Ball(Decimal("0.5"), _ZERO, _ZERO, True))


def arc_tangent(ball: Ball) -> Ball:
    """Return the arc tangent of a real number."""
    return _angle_of(Ball(_ONE, _real(ball).re, ball.error, False))


def arc_sine(ball: Ball) -> Ball:
    """Return the arc sine of a real number from -1 to 1."""
    rest = subtract(Ball(_ONE, _ZERO, _ZERO, True), multiply(_real(ball), ball))
    if abs(ball.re) == 1 and not ball.error:
        return multiply(pi(), Ball(ball.re / 2, _ZERO, _ZERO, True))
    side = square_root(rest)
    return _angle_of(Ball(_real(side).re, ball.re, side.error + ball.error, False))


def _real(ball: Ball) -> Ball:
    if not ball.real:
        raise UndefinedValueError("this function takes real numbers")
    return ball


def _times_i(ball: Ball) -> Ball:
    return Ball(-ball.im, ball.re, ball.error, False)


def _exponentials(ball: Ball) -> tuple[Ball, Ball]:
    turned = _times_i(ball)
    return exponential(turned), exponential(negative(turned))


def _rounded(
    re: Decimal, im: Decimal, error: Decimal, real: bool, *, size: Decimal | None = None
) -> Ball:
    """Return a ball whose error has room for the rounding of numbers up to `size`."""
    largest = max(abs(re) + abs(im), size or _ZERO)
    return Ball(re, im, (error + largest * _ulp()) * Decimal("1.000001"), real)


def _ulp() -> Decimal:
    """Return a bound on the relative error of a few roundings."""
    return Decimal((0, (1,), 3 - getcontext().prec))


@cache
def _pi() -> Decimal:
    """Return pi by Machin's formula in whole numbers."""
    one = 10 ** (_PI_DIGITS + 10)
    whole = 4 * (4 * _arc_cotangent(5, one) - _arc_cotangent(239, one))
    with localcontext(Context(prec=_PI_DIGITS)):
        return Decimal(whole) / Decimal(one)


def _arc_cotangent(value: int, one: int) -> int:
    """Return the arc cotangent of a whole number, as a multiple of 1 / `one`."""
    total = term = one // value
    divisor = 1
    while term:
        term //= -value * value
        divisor += 2
        total += term // divisor
    return total


def _sine_and_cosine(angle: Decimal) -> tuple[Decimal, Decimal]:
    if angle and angle.adjusted() > _MAX_ANGLE_DIGITS:
        raise UndefinedValueError("the angle is too large")
    with localcontext() as context:
        context.prec += 10 + max(0, angle.adjusted())
        context.clear_traps()
        quarters = (angle / (_pi() / 2)).to_integral_value()
        rest = angle - quarters * (_pi() / 2)
        sine, cosine = _series(rest, 1), _series(rest, 0)
    turned = [(sine, cosine), (cosine, -sine), (-sine, -cosine), (-cosine, sine)]
    sine, cosine = turned[int(quarters) % 4]
    return +sine, +cosine


def _series(angle: Decimal, start: int) -> Decimal:
    """Return the power series of the sine (from 1) or of the cosine (from 0)."""
    term = total = angle if start else _ONE
    smallest = Decimal((0, (1,), -getcontext().prec))
    step, square = start, -angle * angle
    while abs(term) > smallest:
        term *= square / ((step + 1) * (step + 2))
        total += term
        step += 2
    return total


def _angle_of(ball: Ball) -> Ball:
    """Return the argument of a complex number, between -pi and pi."""
    least = ball.size - ball.error
    if least <= 0 or (ball.re <= 0 and abs(ball.im) <= ball.error):
        raise UndefinedValueError("the direction is not known")
    # The float is right to 15 digits; what is left is a small angle with a short series.
    scale = max(abs(ball.re), abs(ball.im))
    about = Decimal(math.atan2(float(ball.im / scale), float(ball.re / scale)))
    sine, cosine = _sine_and_cosine(about)
    rest = (ball.im * cosine - ball.re * sine) / (ball.re * cosine + ball.im * sine)
    total = term = rest
    for divisor in range(3, 31, 2):
        term *= -rest * rest
        total += term / divisor
    return _rounded(about + total, _ZERO, 2 * ball.error / least, True, size=Decimal(4))

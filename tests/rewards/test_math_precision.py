"""Closed forms that nearly agree are different, and a bound on the error says how nearly."""

from decimal import Decimal, localcontext
from fractions import Fraction

import pytest

from textpolicy.rewards.verifiers import math_equal
from textpolicy.rewards.verifiers.mathematics import precision as precise


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (r"\sqrt{10^{60}+1}-10^{30}", r"\sqrt{10^{60}+2}-10^{30}"),
        (r"e^{\pi\sqrt{163}}", "262537412640768744"),
        (r"\sqrt{2}+10^{-60}", r"\sqrt{2}"),
        (r"\sqrt{2}+e^{-200}", r"\sqrt{2}"),
        (r"\cos(10^{-40})", "1"),
        ("e^{-300}", "0"),
        ("e^{-30000}", "0"),
        ("x+10^{-60}", "x"),
        ("xe^{-200}", "0"),
        ("2^{100000}", "2^{100001}"),
        (r"\frac{1}{2004!}", r"\frac{1}{2006!}"),
        (r"\sin(10^{20}\pi)", "10^{-50}"),
        (r"\tan 90^\circ", r"\tan 270^\circ"),
    ],
)
def test_numbers_that_nearly_agree_are_different(left, right):
    assert not math_equal(left, right) and not math_equal(right, left)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (r"\sin(10^{20}\pi)", "0"),
        (r"\sqrt{10^{40}+1}-10^{20}", r"\frac{1}{\sqrt{10^{40}+1}+10^{20}}"),
        (r"4\arctan\frac15-\arctan\frac1{239}", r"\frac{\pi}{4}"),
        (r"\cos\frac{\pi}{7}-\cos\frac{2\pi}{7}+\cos\frac{3\pi}{7}", "0.5"),
        (r"\sqrt[3]{2+\sqrt5}+\sqrt[3]{2-\sqrt5}", "1"),
        (r"\ln(2+\sqrt3)", r"-\ln(2-\sqrt3)"),
        ("2^{100000}", "4^{50000}"),
        (r"\arcsin 1", r"\frac{\pi}{2}"),
        (r"\cosh^2 x-\sinh^2 x", "1"),
        (r"\tanh x", r"\frac{e^{2x}-1}{e^{2x}+1}"),
        (r"\arcsin\frac35+\arccos\frac35", r"\frac\pi2"),
        ("i^i", r"e^{-\pi/2}"),
        (r"(1+i)^{10}", "32i"),
        (r"x\sqrt{x}", r"\sqrt{x^3}"),
    ],
)
def test_closed_forms_of_one_value_are_equal(left, right):
    assert math_equal(left, right) and math_equal(right, left)


def test_an_answer_that_is_right_only_at_fixed_values_of_x_is_wrong():
    # Points that were once fixed, and the first small numbers.
    for points in (("0.7390851332151606", "2.2360679774997896"), ("0", "1"), ("1", "2")):
        first, second = points
        assert not math_equal(f"x+1000(x-{first})(x-{second})", "x")


def test_the_bound_of_a_ball_holds_its_error():
    with localcontext(precise.decimal_context(30)):
        third = precise.as_ball(Fraction(1, 3))
        whole = precise.add(third, precise.add(third, third))
        assert 0 < abs(whole.re - 1) <= whole.error < Decimal("1e-26")
        assert precise.agree(whole, Fraction(1), 20)
        assert not precise.agree(whole, Fraction(1), 28)
        assert precise.is_certainly_different(whole, Fraction(10**20 + 1, 10**20))


def test_what_is_lost_in_a_difference_is_in_the_bound():
    with localcontext(precise.decimal_context(30)):
        large = precise.add(precise.pi(), precise.as_ball(Fraction(10**20)))
        small = precise.subtract(large, precise.as_ball(Fraction(10**20)))
        assert abs(small.re - precise.pi().re) <= small.error
        assert small.error > Decimal("1e-10")

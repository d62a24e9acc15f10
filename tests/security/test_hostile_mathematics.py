"""Answers with which a model could deceive, hang or take over the mathematics verifier."""

import random
import time
from functools import partial
from multiprocessing import get_context

import pytest

from tests.security.hostile_texts import MATHS
from textpolicy.rewards.verifiers import math_equal, number_equal

LIMIT = 0.05
ATTACKS = MATHS | {
    "million braces": "{" * 1_000_000 + "}" * 1_000_000,
    "million braces in a box": r"\boxed{" + "{" * 1_000_000 + "}" * 1_000_001,
    "huge binomial": r"\binom{99999999999999999999}{9999999999}",
    "large binomial": r"\binom{16000}{8000}",
    "double factorial": "99999999!!",
    "factorial of a factorial": "((9!)!)!",
    "tower of roots": r"\sqrt[99999999]{2}^{9^{9}}",
    "power of a fraction": r"(\frac{999999999}{999999998})^{99999999}",
    "matrix of a million": r"\begin{pmatrix}" + ("1&" * 999 + "1\\\\") * 1000 + r"\end{pmatrix}",
    "matrix in the length": r"\begin{pmatrix}" + "1&" * 100 + r"1\end{pmatrix}",
    "matrices in a matrix": r"\begin{pmatrix}" * 7 + "1" + r"\end{pmatrix}" * 7,
    "union of many": r"\cup".join(["(1,2)"] * 100_000),
    "union in the length": r"\cup".join(f"[{n},{n + 1})" for n in range(20)),
    "chain of inequalities": "1" + "<x<1" * 60,
    "both signs": "1" + r"\pm 1" * 40,
    "both signs in a list": r"\pm 1," * 30,
    "absolute values": "|" * 120 + "x" + "|" * 120,
    "sines of sines": r"\sin" * 20 + "1",
    "sines in brackets": r"\sin(" * 20 + "x" + ")" * 20,
    "large angle": r"\sin 10^{30}",
    "large angle in brackets": r"\tan(9^{9^{3}})",
    "exponential of an exponential": "e^{e^{e^{e^{e}}}}",
    "imaginary tower": "i^{i^{i^{i^{i}}}}",
    "logarithm to a huge base": r"\log_{9^{999}} 9^{9^{4}}",
    "many variables": "+".join(f"x_{{{n}}}^{{99}}" for n in range(18)),
    "large degree": "(a+b+c+d)^{9999}",
    "tower of variables": "x^{y^{x^{y^{x^{y}}}}}",
    "factorial of a variable": "(99n)!+((n!)!)!",
    "binomials of a variable": r"\binom{99n}{9n}" * 12,
    "floors": r"\lfloor" * 20 + "x" + r"\rfloor" * 20,
    "units in a row": "5 " + "m " * 120,
    "units with powers": "5 " + "km^4" * 50,
    "slashes": "5 cm" + "/" * 240,
    "ratio": "1" + ":1" * 120,
    "repeating decimal": r"0.\overline{" + "3" * 240 + "}",
    "dots": "0." + "3" * 230 + "...",
    "number of a base": "1" * 240 + "_{2}",
    "base of a number": "1_{" + "9" * 200 + "}",
    "fractions without braces": r"\frac" * 45 + "1" * 30,
    "backtracking spaces": "1" + " " * 250 + "x",
    "backtracking text": r"\text{" * 40,
    "backtracking set": "{x:" + "<" * 200,
    "backtracking maths": "$" + "x" * 9_000 + "\\(" * 300,
    "backtracking answer": "answer" + " " * 9_000 + "answer is" * 100,
    "words": "aa " * 3_000 + "5",
    "equals signs": "x" + "=x" * 120,
}


def attack_checks(text):
    """Return calls with an attack as the answer, as the answer of the row, and as both."""
    calls = [(text, "77"), ("5", text), (text, text), (f"{text}+1", text)]
    return [
        *(partial(math_equal, *call) for call in calls),
        partial(number_equal, text, "77"),
    ]


def measure_attacks():
    """Return the CPU seconds of the slowest call of each attack."""
    math_equal("1", "\\sin 1")

    def seconds_of(check):
        spent = []
        # A busy machine can slow down one call, but not three.
        while not spent or (min(spent) >= LIMIT and len(spent) < 3):
            started = time.process_time()
            check()
            spent.append(time.process_time() - started)
        return min(spent)

    return {name: max(map(seconds_of, attack_checks(ATTACKS[name]))) for name in ATTACKS}


@pytest.mark.proves("S4", "S7")
def test_no_attack_on_mathematics_is_slow(attempts):
    # The type checks of the tests take longer than the verifier, so another process measures.
    with get_context("spawn").Pool(1) as pool:
        measured = pool.apply(measure_attacks)
    attempts(sum(len(attack_checks(text)) for text in ATTACKS.values()))
    assert measured.keys() == ATTACKS.keys()
    assert not {name: spent for name, spent in measured.items() if spent >= LIMIT}


@pytest.mark.proves("S4")
@pytest.mark.parametrize("text", ATTACKS.values(), ids=ATTACKS)
def test_no_attack_on_mathematics_is_right(text, attempts):
    attempts(2)
    assert not math_equal(text, "77") and not number_equal(text, "77")


PIECES = (
    r"\frac \frac{ } { ( ) [ ] | \left| \sqrt \sqrt[ ^ _ ^{ _{ x y i e \pi \infty 1 2 12 0 .5 3.7 "
    r"1,234 + - * / = < \le > \ne \in \cup \setminus , ; and or \pm \mp \sin \log_ \ln \arctan "
    r"! !! % ° ^\circ \text{ \text{cm} cm hours $ \$ \binom \lfloor \rfloor \begin{pmatrix} "
    r"\end{pmatrix} & \\ : \mid \approx 0.\overline{12} 1010_2 \{ \} \emptyset \mathbb{R} \langle "
    r"f(x) \theta per \boxed{ answer is <answer> </answer> #### e5 1e-3 million th \choose "
    r"\displaystyle ~ a.m."
)
JUMBLES = 1500


def judge_jumbles():
    """Judge random sequences of signs; what raises an error ends the process with it."""
    dice = random.Random(0)
    pieces = [*PIECES.split(), " "]
    for _ in range(JUMBLES):
        text, answer = ("".join(dice.choices(pieces, k=dice.randint(1, 12))) for _ in range(2))
        math_equal(text, answer)
        math_equal(answer, answer)
        number_equal(text, answer)
    return 3 * JUMBLES


@pytest.mark.proves("S4")
def test_no_jumble_of_signs_raises_an_error(attempts):
    with get_context("spawn").Pool(1) as pool:
        attempts(pool.apply(judge_jumbles))

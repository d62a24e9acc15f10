"""Reach a target with three numbers: an answer to `make 13 from 2 3 5` is `3*5-2`.

An expression of + - * / and parentheses is right if it uses each number once and has the target
as its value.
"""

import re
from collections.abc import Iterator, Mapping
from fractions import Fraction
from itertools import permutations, product
from random import Random
from typing import Any

LARGEST_NUMBER = 12
LARGEST_TARGET = 99
# Tasks have more sums and differences than products. No task needs a quotient.
OPERATORS = "++--*"
MAX_TOKENS = 12
# Longer than any right answer, and short enough to be parsed at once.
LONGEST = 100


def make(rng: Random) -> tuple[str, dict[str, Any]]:
    while True:
        numbers = [rng.randint(1, LARGEST_NUMBER) for _ in range(3)]
        target = value(_write(numbers, rng.choices(OPERATORS, k=2)))
        if target in range(1, LARGEST_TARGET + 1):
            break
    numbers.sort()
    prompt = f"make {target} from {' '.join(map(str, numbers))}"
    return prompt, {"numbers": numbers, "target": int(target)}


def gold(example: Mapping[str, Any]) -> str:
    for operators, numbers in product(product("+-*", repeat=2), permutations(example["numbers"])):
        expression = _write(numbers, operators)
        if value(expression) == example["target"]:
            return expression
    raise ValueError(f"no expression without parentheses reaches {example['target']}")


def reward(prompt: str, visible_answer: str, example: Mapping[str, Any]) -> float:
    if value(visible_answer) != example["target"]:
        return 0.0
    used = sorted(int(number) for number in re.findall(r"[0-9]+", visible_answer))
    return float(used == sorted(example["numbers"]))


def value(expression: str) -> Fraction | None:
    """Return the value of the expression, or None if it is malformed, too long or divides by 0."""
    if len(expression) > LONGEST or re.search(r"[^0-9+*/() -]|[0-9]\s+[0-9]", expression.strip()):
        return None
    tokens = iter([*re.findall(r"[0-9]+|[-+*/()]", expression), "end"])
    try:
        total, after = _sum(next(tokens), tokens)
    except (ValueError, ZeroDivisionError):
        return None
    return total if after == "end" else None


def _sum(token: str, rest: Iterator[str]) -> tuple[Fraction, str]:
    total, token = _product(token, rest)
    while token in ("+", "-"):
        sign = 1 if token == "+" else -1
        term, token = _product(next(rest), rest)
        total += sign * term
    return total, token


def _product(token: str, rest: Iterator[str]) -> tuple[Fraction, str]:
    total, token = _number(token, rest)
    while token in ("*", "/"):
        times = token == "*"
        factor, token = _number(next(rest), rest)
        total = total * factor if times else total / factor
    return total, token


def _number(token: str, rest: Iterator[str]) -> tuple[Fraction, str]:
    if token != "(":
        return Fraction(int(token)), next(rest)
    total, token = _sum(next(rest), rest)
    if token != ")":
        raise ValueError("a parenthesis is not closed")
    return total, next(rest)


def _write(numbers: tuple[int, ...] | list[int], operators: tuple[str, ...] | list[str]) -> str:
    return f"{numbers[0]}{operators[0]}{numbers[1]}{operators[1]}{numbers[2]}"

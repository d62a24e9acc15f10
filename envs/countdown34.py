"""Reach a target with three or four numbers, from rows in the form of Countdown-Tasks-3to4.

`--data` takes rows with `nums` and `target`. Without it the published tasks are downloaded. The
answer is an expression of + - * / and parentheses between <answer> and </answer>.
"""

import re
from collections.abc import Iterator, Mapping
from fractions import Fraction
from itertools import combinations
from typing import Any

from textpolicy_envs.countdown import value

DATA = "hf:Jiayi-Pan/Countdown-Tasks-3to4"
MAX_TOKENS = 512
MOST_NUMBERS = 4
LARGEST = 10**6
_Terms = list[tuple[Fraction, str]]


def PROMPT(example: Mapping[str, Any]) -> str:
    numbers, target = numbers_of(example), example.get("target")
    if not _is_number(target):
        raise ValueError(f"target is {target!r:.60}; expected a whole number to {LARGEST:,}")
    return (
        f"Reach {target} with the numbers {', '.join(map(str, numbers))}. Use each number exactly "
        "once, with + - * / and parentheses. You may think first. End with the expression alone, "
        "as in <answer>(1+2)/3</answer>."
    )


def gold(example: Mapping[str, Any]) -> str:
    terms = [(Fraction(number), str(number)) for number in numbers_of(example)]
    for found, expression in _results(terms):
        if found == example["target"]:
            return f"<answer>{expression}</answer>"
    raise ValueError(f"no expression of {numbers_of(example)} reaches {example['target']}")


def reward(prompt: str, visible_answer: str, example: Mapping[str, Any]) -> float:
    _, opened, rest = visible_answer.rpartition("<answer>")
    expression, closed, _ = rest.partition("</answer>")
    if not (opened and closed) or value(expression) != example["target"]:
        return 0.0
    used = sorted(int(number) for number in re.findall(r"[0-9]+", expression))
    return float(used == sorted(numbers_of(example)))


def numbers_of(example: Mapping[str, Any]) -> list[int]:
    """Return the numbers of a row. Raise ValueError if they are not a few whole numbers."""
    numbers = example.get("nums")
    if (
        not isinstance(numbers, list)
        or not 1 <= len(numbers) <= MOST_NUMBERS
        or not all(map(_is_number, numbers))
    ):
        raise ValueError(
            f"nums is {numbers!r:.60}; expected a list of at most {MOST_NUMBERS} whole numbers "
            f"from 0 to {LARGEST:,}"
        )
    return numbers


def _is_number(number: object) -> bool:
    return type(number) is int and 0 <= number <= LARGEST


def _results(terms: _Terms) -> Iterator[tuple[Fraction, str]]:
    """Yield the value of every expression that uses each of the terms once."""
    if len(terms) == 1:
        yield terms[0]
        return
    for first, second in combinations(range(len(terms)), 2):
        rest = [term for place, term in enumerate(terms) if place not in (first, second)]
        for joined in _joined(terms[first], terms[second]):
            yield from _results([*rest, joined])


def _joined(one: tuple[Fraction, str], other: tuple[Fraction, str]) -> _Terms:
    (a, left), (b, right) = one, other
    joined = [
        (a + b, f"({left}+{right})"),
        (a * b, f"({left}*{right})"),
        (a - b, f"({left}-{right})"),
        (b - a, f"({right}-{left})"),
    ]
    joined += [(a / b, f"({left}/{right})")] if b else []
    return joined + ([(b / a, f"({right}/{left})")] if a else [])

"""Find three hidden digits in four guesses, with a hint for each digit after each guess.

The hints are `+` for higher, `-` for lower and `=` for right: if the digits are 274, the hint to
`555` is `-+-`.
"""

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

LENGTH = 3
MAX_TOKENS = LENGTH + 2
MAX_TURNS = 4


def make(rng: Random) -> tuple[str, dict[str, Any]]:
    return f"guess {LENGTH} digits", {"digits": "".join(rng.choices("0123456789", k=LENGTH))}


def problem(example: Mapping[str, Any]) -> str:
    return example["digits"]


def reply(completions: Sequence[str], example: Mapping[str, Any]) -> str | None:
    guess = completions[-1].strip()
    if guess == example["digits"]:
        return None
    if len(guess) != LENGTH or not all(digit in "0123456789" for digit in guess):
        return "?"
    return "".join(map(_mark, guess, example["digits"]))


def gold(example: Mapping[str, Any]) -> list[str]:
    """Guess the middle of each digit's range, which finds every number in four guesses."""
    ranges = [(0, 9)] * LENGTH
    guesses: list[str] = []
    while not guesses or guesses[-1] != example["digits"]:
        middles = [(low + high + 1) // 2 for low, high in ranges]
        guesses.append("".join(map(str, middles)))
        marks = map(_mark, guesses[-1], example["digits"])
        ranges = [_narrow(*span) for span in zip(ranges, middles, marks, strict=True)]
    return guesses


def reward(prompt: str, visible_answer: str, example: Mapping[str, Any]) -> float:
    return float(visible_answer.strip() == example["digits"])


def _mark(guessed: str, hidden: str) -> str:
    return "=" if guessed == hidden else "+" if guessed < hidden else "-"


def _narrow(span: tuple[int, int], middle: int, mark: str) -> tuple[int, int]:
    low, high = span
    return {"+": (middle + 1, high), "-": (low, middle - 1), "=": (middle, middle)}[mark]

"""Add two three-digit numbers: `347+185=` is answered by `0532`.

Gold answers have four digits, because with one width every digit stands at one distance from those
that it is the sum of. The embedded model learns that in minutes, and answers of two widths do not.
"""

from collections.abc import Mapping
from random import Random
from typing import Any

MAX_TOKENS = 6


def make(rng: Random) -> tuple[str, dict[str, Any]]:
    left, right = rng.randint(100, 999), rng.randint(100, 999)
    return f"{left}+{right}=", {"sum": left + right}


def gold(example: Mapping[str, Any]) -> str:
    return f"{example['sum']:04d}"


def reward(prompt: str, completion: str, example: Mapping[str, Any]) -> float:
    answer = completion.strip()
    return float(answer.isdecimal() and int(answer) == example["sum"])

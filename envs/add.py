"""Add two numbers of three digits: the answer to `347+185=` is `532`."""

from collections.abc import Mapping
from random import Random
from typing import Any

MAX_TOKENS = 6


def make(rng: Random) -> tuple[str, dict[str, Any]]:
    left, right = rng.randint(100, 999), rng.randint(100, 999)
    return f"{left}+{right}=", {"sum": left + right}


def gold(example: Mapping[str, Any]) -> str:
    return str(example["sum"])


def reward(prompt: str, visible_answer: str, example: Mapping[str, Any]) -> float:
    return float(visible_answer.strip() == gold(example))

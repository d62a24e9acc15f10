"""Write eight letters backwards: the answer to `reverse KQZAWMTB` is `BTMWAZQK`."""

from collections.abc import Mapping
from random import Random
from string import ascii_uppercase
from typing import Any

LENGTH = 8
MAX_TOKENS = LENGTH + 2


def make(rng: Random) -> tuple[str, dict[str, Any]]:
    letters = "".join(rng.choices(ascii_uppercase, k=LENGTH))
    return f"reverse {letters}", {"letters": letters}


def gold(example: Mapping[str, Any]) -> str:
    return example["letters"][::-1]


def reward(prompt: str, visible_answer: str, example: Mapping[str, Any]) -> float:
    return float(visible_answer.strip() == gold(example))

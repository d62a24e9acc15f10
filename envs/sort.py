"""Sort eight digits: the answer to `sort 83120475` is `01234578`."""

from collections.abc import Mapping
from random import Random
from typing import Any

LENGTH = 8
MAX_TOKENS = LENGTH + 2


def make(rng: Random) -> tuple[str, dict[str, Any]]:
    digits = "".join(rng.choices("0123456789", k=LENGTH))
    return f"sort {digits}", {"digits": digits}


def gold(example: Mapping[str, Any]) -> str:
    return "".join(sorted(example["digits"]))


def reward(prompt: str, visible_answer: str, example: Mapping[str, Any]) -> float:
    return float(visible_answer.strip() == gold(example))

"""Sums of two numbers, answered in two turns; the environment waits 50 ms in each turn."""

import time
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

SECONDS = 0.05
MAX_TOKENS = 6
MAX_TURNS = 2


def make(rng: Random) -> tuple[str, dict[str, Any]]:
    a, b = rng.randrange(1000), rng.randrange(1000)
    return f"{a}+{b}=", {"sum": str(a + b)}


def reply(completions: Sequence[str], example: Mapping[str, Any]) -> str | None:
    time.sleep(SECONDS)
    return None if len(completions) == MAX_TURNS else "again"


def gold(example: Mapping[str, Any]) -> list[str]:
    return [example["sum"]] * MAX_TURNS


def reward(prompt: str, visible_answer: str, example: Mapping[str, Any]) -> float:
    return float(visible_answer.strip() == example["sum"])

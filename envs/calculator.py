"""Call a tool, then answer: for `47*83= with add(a,b) sub(a,b) mul(a,b)`, `mul(47,83)` and `3901`.

A call is a line of its own, written as in Python. An answer without a call is the final answer.
"""

from collections.abc import Mapping
from random import Random
from typing import Any

MAX_TOKENS = 14
MAX_TURNS = 3
CALLS = "written"


def add(a: int, b: int) -> int:
    """The sum of two numbers."""
    return a + b


def sub(a: int, b: int) -> int:
    """The first number less the second."""
    return a - b


def mul(a: int, b: int) -> int:
    """The product of two numbers."""
    return a * b


TOOLS = [add, sub, mul]
SIGNS = {"+": add, "-": sub, "*": mul}


def make(rng: Random) -> tuple[str, dict[str, Any]]:
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    sign = rng.choice(list(SIGNS))
    prompt = f"{a}{sign}{b}= with add(a,b) sub(a,b) mul(a,b)"
    return prompt, {"a": a, "b": b, "sign": sign, "answer": SIGNS[sign](a, b)}


def gold(example: Mapping[str, Any]) -> list[str]:
    tool = SIGNS[example["sign"]].__name__
    return [f"{tool}({example['a']},{example['b']})", str(example["answer"])]


def reward(prompt: str, visible_answer: str, example: Mapping[str, Any]) -> float:
    return float(visible_answer.strip() == str(example["answer"]))

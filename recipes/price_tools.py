"""Look two prices up with a tool, then answer with their sum.

A price follows from its code by arithmetic that a model cannot guess, so only calls earn a reward.
"""

import json
from collections.abc import Mapping
from random import Random
from typing import Any

from textpolicy.environments import tool_prompt

MAX_TOKENS = 96
MAX_TURNS = 4


def price(code: int) -> int:
    """The price of the article with this code, in euros."""
    return 3 + code * 7919 % 97


TOOLS = [price]


def make(rng: Random) -> tuple[Any, dict[str, Any]]:
    codes = rng.sample(range(1000, 10000), 2)
    question = f"What do the articles {codes[0]} and {codes[1]} cost together? Answer with the sum."
    return tool_prompt(TOOLS, question), {"codes": codes, "answer": sum(map(price, codes))}


def gold(example: Mapping[str, Any]) -> list[str]:
    calls = [{"name": "price", "arguments": {"code": code}} for code in example["codes"]]
    lines = [f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in calls]
    return ["\n".join(lines), str(example["answer"])]


def reward(prompt: str, visible_answer: str, example: Mapping[str, Any]) -> float:
    return float(visible_answer.strip().rstrip(".").split()[-1:] == [str(example["answer"])])

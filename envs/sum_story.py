"""Solve a story of one step: `Femi has 3 apples and gets 8 more. How many apples now?`.

The answer is the calculation, `3 + 8 = 11`. Three solved stories come before the question, because
a small model answers in whole sentences without them. The reward is 0.3 for the right calculation
with a wrong result, and 1 if the result is right too.
"""

import re
from collections.abc import Mapping
from random import Random
from typing import Any

NAMES = "Ada Ben Carla Femi Grace Hugo Iris Kofi Lena"
THINGS = "apples books coins eggs pens shells stamps marbles"
EXAMPLES = [
    {"role": "user", "content": "Omar has 5 pears and gets 2 more. How many pears now?"},
    {"role": "assistant", "content": "5 + 2 = 7"},
    {"role": "user", "content": "Zoe has 8 cups and gives 5 away. How many cups now?"},
    {"role": "assistant", "content": "8 - 5 = 3"},
    {"role": "user", "content": "Mia has 13 hats and gives 6 away. How many hats now?"},
    {"role": "assistant", "content": "13 - 6 = 7"},
]
SMALLEST, LARGEST = 2, 19
MAX_TOKENS = 18


def make(rng: Random) -> tuple[list[dict[str, str]], dict[str, Any]]:
    name, things = rng.choice(NAMES.split()), rng.choice(THINGS.split())
    first, second = (rng.randint(SMALLEST, LARGEST) for _ in range(2))
    if rng.random() < 0.5:
        told, calculation, result = f"gets {second} more", f"{first} + {second}", first + second
    else:
        first, result = first + second, first
        told, calculation = f"gives {second} away", f"{first} - {second}"
    story = f"{name} has {first} {things} and {told}. How many {things} now?"
    example = {"calculation": calculation, "result": result}
    return [*EXAMPLES, {"role": "user", "content": story}], example


def gold(example: Mapping[str, Any]) -> str:
    return f"{example['calculation']} = {example['result']}"


def reward(prompt: str, visible_answer: str, example: Mapping[str, Any]) -> float:
    answer = visible_answer.strip()
    if answer == gold(example):
        return 1.0
    calculation, _, result = answer.partition(" = ")
    is_number = re.fullmatch("[0-9]{1,3}", result) is not None
    return 0.3 if calculation == example["calculation"] and is_number else 0.0

"""Write a number in digits: the answer to `In digits: four hundred and twenty-five` is `425`.

Two solved numbers come before the question, because a small model answers in whole sentences
without them.
"""

from collections.abc import Mapping
from random import Random
from typing import Any

ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
)
TENS = "zero ten twenty thirty forty fifty sixty seventy eighty ninety"
EXAMPLES = [
    {"role": "user", "content": "In digits: two hundred and seven"},
    {"role": "assistant", "content": "207"},
    {"role": "user", "content": "In digits: sixty-four"},
    {"role": "assistant", "content": "64"},
]
SMALLEST, LARGEST = 210, 1199
MAX_TOKENS = 8


def make(rng: Random) -> tuple[list[dict[str, str]], dict[str, Any]]:
    number = rng.randint(SMALLEST, LARGEST)
    question = {"role": "user", "content": f"In digits: {in_words(number)}"}
    return [*EXAMPLES, question], {"number": number}


def gold(example: Mapping[str, Any]) -> str:
    return str(example["number"])


def reward(prompt: str, visible_answer: str, example: Mapping[str, Any]) -> float:
    return float(visible_answer.strip() == gold(example))


def in_words(number: int) -> str:
    """Return the number as British English writes it: `nine hundred and three`."""
    if number < 20:
        return ONES.split()[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return TENS.split()[tens] + (f"-{ONES.split()[ones]}" if ones else "")
    size, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
    count, rest = divmod(number, size)
    told = f"{in_words(count)} {name}"
    if not rest:
        return told
    return f"{told} {in_words(rest)}" if rest >= 100 else f"{told} and {in_words(rest)}"

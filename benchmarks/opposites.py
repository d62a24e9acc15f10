"""Name the opposite of a word, in one word: a task for `benchmarks/rates.py`.

The reward is 0.3 for an answer of one word, and 1 if the word is right.
"""

from collections.abc import Mapping
from random import Random
from typing import Any

OPPOSITES = """
    hot cold big small up down day night open closed left right young old rich poor happy sad
    fast slow light dark hard soft early late full empty wet dry strong weak high low near far
    clean dirty loud quiet true false first last long short thick thin wide narrow good bad
    begin end love hate buy sell win lose push pull war peace life death friend enemy
    summer winter north south east west black white inside outside above below always never
    before after easy difficult cheap expensive deep shallow sweet sour sharp blunt smooth rough
    tall short alive dead
"""
QUESTIONS = [
    "What is the opposite of {}? Answer with one word.",
    "Give the opposite of the word {}. One word only.",
    "Opposite of {}, in one word:",
]
MAX_TOKENS = 12

_WORDS = OPPOSITES.split()
_PAIRS = list(zip(_WORDS[::2], _WORDS[1::2], strict=True))
PAIRS = [*_PAIRS, *((right, left) for left, right in _PAIRS)]


def make(rng: Random) -> tuple[str, dict[str, Any]]:
    word, opposite = rng.choice(PAIRS)
    return rng.choice(QUESTIONS).format(word), {"opposite": opposite}


def gold(example: Mapping[str, Any]) -> str:
    return example["opposite"]


def reward(completion: str, example: Mapping[str, Any]) -> float:
    answer = completion.strip()
    if len(answer.split()) != 1:
        return 0.0
    return 1.0 if answer.strip(".").lower() == example["opposite"] else 0.3

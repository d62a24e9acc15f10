"""Find the word of a kind: the answer to `rake, banana, red. Which is a fruit?` is `banana`.

Three solved questions come before the question, because a small model answers in whole sentences
without them. Only the word alone is right: a list of the words, or a sentence, earns nothing.
"""

from collections.abc import Mapping
from random import Random
from typing import Any

KINDS = {
    "an animal": "dog cat horse cow lion tiger rabbit sheep wolf monkey goat camel frog donkey",
    "a fruit": "apple banana grape pear lemon cherry mango melon strawberry pineapple apricot",
    "a color": "red blue green yellow purple brown black white pink gray",
    "a tool": "hammer saw drill wrench axe shovel ladder rake scissors pliers screwdriver",
    "a vehicle": "car bus truck train bicycle boat ship tram van tractor motorcycle ferry",
    "a body part": "hand foot nose ear knee arm leg head finger elbow shoulder ankle",
    "a garment": "shirt coat hat skirt glove sock scarf jacket sweater dress",
}
EXAMPLES = [
    {"role": "user", "content": "iron, cup, river. Which is a metal?"},
    {"role": "assistant", "content": "iron"},
    {"role": "user", "content": "cloud, brick, tea. Which is a drink?"},
    {"role": "assistant", "content": "tea"},
    {"role": "user", "content": "song, rose, coin. Which is a flower?"},
    {"role": "assistant", "content": "rose"},
]
CHOICES = 3
MAX_TOKENS = 10


def make(rng: Random) -> tuple[list[dict[str, str]], dict[str, Any]]:
    kinds = rng.sample(list(KINDS), CHOICES)
    words = [rng.choice(KINDS[kind].split()) for kind in kinds]
    shown = ", ".join(rng.sample(words, CHOICES))
    question = {"role": "user", "content": f"{shown}. Which is {kinds[0]}?"}
    return [*EXAMPLES, question], {"word": words[0]}


def gold(example: Mapping[str, Any]) -> str:
    return example["word"]


def reward(prompt: str, visible_answer: str, example: Mapping[str, Any]) -> float:
    return float(visible_answer.strip().lower() == gold(example))

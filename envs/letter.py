"""Find a letter of a word: the answer to `Last letter of garden?` is `n`.

Four solved questions come before the question, because a small model answers in whole sentences
without them.
"""

from collections.abc import Mapping
from random import Random
from typing import Any

WORDS = """
    address airport animal answer artist autumn basket battle bedroom bottle branch bread breakfast
    bridge brother button camera candle captain carpet castle chair cheese chicken church circle
    city clock coffee color copper corner cotton country cousin crystal danger daughter desert
    diamond dinner doctor dragon drawer dream eagle engine evening family farmer father feather
    field finger fire fish flower forest fountain friend garden gate giant glass glove grass
    guitar harbor hat hill history holiday honey horse hospital hotel house husband insect
    island jacket journey jungle kettle kitchen ladder lamp language lawyer leather lemon letter
    library lion machine market meadow metal milk minute mirror monkey month morning mother
    mountain mouse museum music napkin neighbor nephew night ocean office orange orchard oven
    owner palace paper parent party pencil people pepper picture pillow pilot pirate planet
    plate pocket potato prince problem pumpkin puzzle queen question rabbit rain reason ribbon
    river road robot rocket roof rose salad sandwich school scissors season secret shadow
    shelter shirt shoulder silver singer sister soldier spider spring station stomach storm
    street student sugar summer sunset table teacher temple theater thunder ticket tiger tomato
    tower traffic train travel tunnel turtle uncle valley village violin voice wagon wallet
    water weather wedding whale window winter wizard wolf woman wood world yard yellow
"""
EXAMPLES = [
    {"role": "user", "content": "First letter of cloud?"},
    {"role": "assistant", "content": "c"},
    {"role": "user", "content": "Last letter of hammer?"},
    {"role": "assistant", "content": "r"},
    {"role": "user", "content": "Last letter of stone?"},
    {"role": "assistant", "content": "e"},
    {"role": "user", "content": "First letter of vase?"},
    {"role": "assistant", "content": "v"},
]
PLACES = {"First": 0, "Last": -1}
MAX_TOKENS = 6


def make(rng: Random) -> tuple[list[dict[str, str]], dict[str, Any]]:
    word, place = rng.choice(WORDS.split()), rng.choice(list(PLACES))
    question = {"role": "user", "content": f"{place} letter of {word}?"}
    return [*EXAMPLES, question], {"letter": word[PLACES[place]]}


def gold(example: Mapping[str, Any]) -> str:
    return example["letter"]


def reward(prompt: str, visible_answer: str, example: Mapping[str, Any]) -> float:
    return float(visible_answer.strip().lower() == gold(example))

"""Write a sentence by rules: `Write one sentence about a cat in 5 words. Begin with My.`

A right answer is `My cat sleeps all day.` The reward looks at the form only: one sentence that
names the subject, with a capital first, a full stop last, and no word twice except articles. Each
word too many or too few costs 0.25, and another first word costs half of the rest.
"""

import re
from collections.abc import Mapping
from random import Random
from typing import Any

SUBJECTS = (
    "cat dog bird horse fish train boat bicycle garden river mountain forest storm teacher doctor "
    "farmer singer child book letter picture song cake melon lamp clock house bridge market castle"
)
BEGINNINGS = "The My Every This"
EXAMPLES = [
    {"role": "user", "content": "Write one sentence about a baker in 5 words. Begin with The."},
    {"role": "assistant", "content": "The baker sells warm bread."},
    {"role": "user", "content": "Write one sentence about a road in 8 words. Begin with This."},
    {"role": "assistant", "content": "This quiet road leads to the old village."},
]
FEWEST, MOST = 4, 9
MAX_TOKENS = 40
# Longer than any right answer.
LONGEST = 200
ENDING = "is old but we all like it"
_SENTENCE = re.compile(r"[A-Z][A-Za-z', ]*\.")
_ARTICLES = {"a", "an", "the"}


def make(rng: Random) -> tuple[list[dict[str, str]], dict[str, Any]]:
    subject, first = rng.choice(SUBJECTS.split()), rng.choice(BEGINNINGS.split())
    words = rng.randint(FEWEST, MOST)
    asked = f"Write one sentence about a {subject} in {words} words. Begin with {first}."
    example = {"subject": subject, "first": first, "words": words}
    return [*EXAMPLES, {"role": "user", "content": asked}], example


def gold(example: Mapping[str, Any]) -> str:
    words = [example["first"], example["subject"], *ENDING.split()]
    return f"{' '.join(words[: example['words']])}."


def reward(prompt: str, visible_answer: str, example: Mapping[str, Any]) -> float:
    answer = visible_answer.strip()
    if len(answer) > LONGEST or not _SENTENCE.fullmatch(answer):
        return 0.0
    words = re.findall(r"[a-z']+", answer.lower())
    others = [word for word in words if word not in _ARTICLES]
    if example["subject"] not in others or len(set(others)) < len(others):
        return 0.0
    value = max(0.0, 1 - abs(len(words) - example["words"]) / 4)
    return value if words[0] == example["first"].lower() else value / 2

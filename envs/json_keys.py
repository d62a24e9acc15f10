"""Write facts as JSON with the named keys: `Femi, 37, a baker, lives in Oslo. JSON: job, name`.

The answer is `{"job": "baker", "name": "Femi"}`. A solved task with other keys comes before the
question, because a small model answers in sentences without it. The reward is the number of right
values divided by the number of keys, of which a key too many or too few is one more.
"""

import json
from collections.abc import Mapping
from random import Random
from typing import Any

NAMES = "Ada Ben Carla Dev Elif Femi Grace Hugo Iris Jun Kofi Lena"
JOBS = "baker doctor farmer lawyer nurse painter pilot singer tailor teacher"
CITIES = "Accra Berlin Cairo Delhi Lagos Lima Oslo Paris Quito Rome"
EXAMPLES = [
    {"role": "user", "content": "Omar, 41, a sailor, lives in Tunis. JSON: city, age"},
    {"role": "assistant", "content": '{"city": "Tunis", "age": 41}'},
]
KEYS = 2
MAX_TOKENS = 40
# Longer than any right answer.
LONGEST = 200


def make(rng: Random) -> tuple[list[dict[str, str]], dict[str, Any]]:
    name, job, city = (rng.choice(words.split()) for words in (NAMES, JOBS, CITIES))
    facts = {"name": name, "age": rng.randint(18, 99), "job": job, "city": city}
    keys = rng.sample(list(facts), KEYS)
    told = f"{name}, {facts['age']}, a {job}, lives in {city}. JSON: {', '.join(keys)}"
    return [*EXAMPLES, {"role": "user", "content": told}], {"facts": {k: facts[k] for k in keys}}


def gold(example: Mapping[str, Any]) -> str:
    return json.dumps(example["facts"])


def reward(prompt: str, visible_answer: str, example: Mapping[str, Any]) -> float:
    facts = example["facts"]
    try:
        short = len(visible_answer) <= LONGEST
        answer = json.loads(visible_answer, object_pairs_hook=_once) if short else None
    except (ValueError, RecursionError):
        return 0.0
    if not isinstance(answer, dict):
        return 0.0
    # 36 and 36.0 are equal in Python, but only 36 is right, so the texts are compared.
    right = [
        key for key in facts.keys() & answer if json.dumps(answer[key]) == json.dumps(facts[key])
    ]
    return len(right) / len(facts.keys() | answer)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object; raise an error if a key is there twice, which could hold two guesses."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key is there twice")
    return dict(pairs)

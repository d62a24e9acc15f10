"""Write facts as a JSON object: `as JSON with name, age, city: Ada, 36, lives in Rome`.

The reward is 0.2 for an object, 0.5 for an object with the right keys, and 1 if the values are
right too.
"""

import json
from collections.abc import Mapping
from random import Random
from typing import Any

NAMES = [
    "Ada",
    "Ben",
    "Carla",
    "Dev",
    "Elif",
    "Femi",
    "Grace",
    "Hugo",
    "Iris",
    "Jun",
    "Kofi",
    "Lena",
]
CITIES = ["Accra", "Berlin", "Cairo", "Delhi", "Lagos", "Lima", "Oslo", "Paris", "Quito", "Rome"]
KEYS = ["name", "age", "city"]
MAX_TOKENS = 64
# Longer than any right answer.
LONGEST = 1000


def make(rng: Random) -> tuple[str, dict[str, Any]]:
    facts = {"name": rng.choice(NAMES), "age": rng.randint(18, 99), "city": rng.choice(CITIES)}
    told = f"{facts['name']}, {facts['age']}, lives in {facts['city']}"
    return f"as JSON with {', '.join(KEYS)}: {told}", facts


def gold(example: Mapping[str, Any]) -> str:
    return json.dumps(dict(example))


def reward(prompt: str, visible_answer: str, example: Mapping[str, Any]) -> float:
    try:
        answer = json.loads(visible_answer) if len(visible_answer) <= LONGEST else None
    except (ValueError, RecursionError):
        return 0.0
    if not isinstance(answer, dict):
        return 0.0
    if set(answer) != set(KEYS):
        return 0.2
    # 36 and 36.0 are equal in Python, but only 36 is right, so the texts are compared.
    same = json.dumps(answer, sort_keys=True) == json.dumps(dict(example), sort_keys=True)
    return 1.0 if same else 0.5

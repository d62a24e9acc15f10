"""Several turns with a tool: a file with `make`, `TOOLS` and `reward` is an environment.

    python examples/tour/3_several_turns_with_a_tool.py [STEPS]
    textpolicy train --env examples/tour/3_several_turns_with_a_tool.py --model Qwen/Qwen3-0.6B

The embedded model has never called a tool, so here its reward stays near 0: the next example shows
it some solved episodes first.
"""

import sys
import tempfile
from collections.abc import Mapping
from random import Random
from typing import Any

import textpolicy as tp
from textpolicy.environments import check_env, gold_answers, load

MAX_TOKENS, MAX_TURNS = 14, 3
CALLS = "written"  # a call is a line such as mul(47,83); without this line, calls are JSON in tags


def mul(a: int, b: int) -> int:
    """The product of two numbers."""
    return a * b


TOOLS = [mul]


def make(rng: Random) -> tuple[str, dict[str, Any]]:
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    return f"{a}*{b}= with mul(a,b)", {"a": a, "b": b, "answer": str(a * b)}


def gold(example: Mapping[str, Any]) -> list[str]:
    """Return the answers of each turn that earn 1: the call, and the number."""
    return [f"mul({example['a']},{example['b']})", example["answer"]]


def reward(visible_answer: str, example: Mapping[str, Any]) -> float:
    return float(visible_answer.strip() == example["answer"])


def main(steps: int = 2) -> None:
    environment = load(__file__)
    check_env(environment, 20)
    (task,) = environment.heldout(1)
    print(task.prompt, gold_answers(environment, task))
    settings = {"task": {"env": __file__}, "run": {"steps": steps}, "evaluation": {"count": 16}}
    with tempfile.TemporaryDirectory() as folder:
        result = tp.run(settings, output=folder, on_event=print)
        print(f"held-out reward {result.before} before, {result.after} after")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

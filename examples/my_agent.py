"""An agent with tools that a run trains: it talks to the policy by the `openai` client.

    textpolicy train --env agent:examples/my_agent.py

`play` is called for each rollout, in a process of its own, and returns the score. The client finds
the policy by OPENAI_BASE_URL and OPENAI_API_KEY, which are set for each rollout.
"""

from collections.abc import Mapping
from random import Random
from typing import Any

from openai import DefaultHttpxClient, OpenAI

MAX_TOKENS = 14
HTTP = DefaultHttpxClient()  # A process plays many rollouts, and this is slow to make.


def add(a: int, b: int) -> int:
    return a + b


def sub(a: int, b: int) -> int:
    return a - b


def mul(a: int, b: int) -> int:
    return a * b


TOOLS = {"+": add, "-": sub, "*": mul}


def make(rng: Random) -> tuple[str, dict[str, Any]]:
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    sign = rng.choice(list(TOOLS))
    prompt = f"{a}{sign}{b}= with add(a,b) sub(a,b) mul(a,b)"
    return prompt, {"a": a, "b": b, "sign": sign, "answer": TOOLS[sign](a, b)}


def call(line: str) -> str | None:
    """Return the result of a line such as mul(47,83), or None if the line is no call."""
    name, _, rest = line.strip().partition("(")
    tool = next((tool for tool in TOOLS.values() if tool.__name__ == name), None)
    try:
        a, b = map(int, rest.rstrip(")").split(","))
    except ValueError:
        return None
    return str(tool(a, b)) if tool else None


def play(prompt: str, example: Mapping[str, Any], model: str) -> float:
    messages: list[Any] = [{"role": "user", "content": prompt}]
    client = OpenAI(http_client=HTTP)
    for _ in range(3):
        answer = client.chat.completions.create(model=model, messages=messages).choices[0].message
        if (result := call(answer.content or "")) is None:
            return float((answer.content or "").strip() == str(example["answer"]))
        messages += [answer, {"role": "tool", "content": result}]
    return 0.0

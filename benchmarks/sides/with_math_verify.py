"""Verdicts of math-verify on pairs of answers. The pairs come as JSON on standard input.

Each answer is tried as it is, and inside \\boxed{} if nothing in it says where the answer is:
math-verify finds most answers only there. The gold answers stand between dollar signs.
"""

import json
import logging
import sys
from importlib.metadata import version

from math_verify import parse, verify

MARKS = ("\\boxed", "\\fbox", "$", "####", "\n", "nswer")


def verdict(answer: str, gold: str, *, boxed: bool) -> bool:
    if boxed and not any(mark in answer for mark in MARKS):
        answer = f"\\boxed{{{answer}}}"
    if "$" not in gold:
        gold = f"${gold}$"
    wanted, given = (parse(text, parsing_timeout=None) for text in (gold, answer))
    return bool(verify(wanted, given, timeout_seconds=None))


def main() -> None:
    logging.disable(logging.CRITICAL)
    pairs = json.load(sys.stdin)
    verdicts = {
        name: [verdict(answer, gold, boxed=name == "boxed") for answer, gold in pairs]
        for name in ("as it is", "boxed")
    }
    print(json.dumps({"version": version("math-verify"), "verdicts": verdicts}))


if __name__ == "__main__":
    main()

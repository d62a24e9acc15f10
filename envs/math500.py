"""Solve problems of mathematics whose answer is an expression, in the form of MATH-500.

`--data` takes rows with `problem`, and `answer` or a `solution` with the answer in a box. Without
it the 500 published problems are downloaded. A copy of an expression of the problem earns nothing.
"""

import re
from collections.abc import Mapping
from typing import Any

from textpolicy.rewards.verifiers import final_answer, last_boxed, math_equal, number_equal

PROMPT = "{problem}\nReason step by step, and write the final answer inside \\boxed{{}}."
DATA = "hf:HuggingFaceH4/MATH-500:test"
MAX_TOKENS = 1024
_UNREAD = re.compile(r"[\s$]|\\[,;!: ]|\\left|\\right|(?<=\\)[dt](?=frac|binom)")


def gold(example: Mapping[str, Any]) -> str:
    return f"\\boxed{{{right_answer(example)}}}"


def reward(prompt: str, visible_answer: str, example: Mapping[str, Any]) -> float:
    right = right_answer(example)
    if is_copy(final_answer(visible_answer) or "", right, str(example.get("problem", ""))):
        return 0.0
    return float(math_equal(visible_answer, right))


def is_copy(given: str, right: str, problem: str) -> bool:
    """Return whether an answer repeats an expression of the problem that is to be calculated."""
    given, right, problem = (_UNREAD.sub("", text) for text in (given, right, problem))
    given = given.rstrip(".")
    if given == right or given not in problem or not re.search(r".[-+*/^!]|\\", given):
        return False
    if re.fullmatch(r"-?[0-9.,]+", right):
        return not number_equal(given, right)
    return right not in problem


def right_answer(example: Mapping[str, Any]) -> str:
    """Return the column `answer`, or what is in the last box of the column `solution`."""
    answer = example.get("answer")
    if answer is None:
        answer = last_boxed(str(example.get("solution", "")))
    if answer is None:
        raise ValueError(
            f"the row has no right answer: its columns are {list(example)}; expected `answer`, or "
            "a `solution` with \\boxed{...}. Name the column: --columns answer=COLUMN"
        )
    return str(answer)

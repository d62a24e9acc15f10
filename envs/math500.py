"""Solve problems of mathematics whose answer is an expression, in the form of MATH-500.

`--data` takes rows with `problem`, and `answer` or a `solution` with the answer in a box. Without
it the 500 published problems are downloaded.
"""

from collections.abc import Mapping
from typing import Any

from textpolicy.rewards.verifiers import last_boxed, math_equal

PROMPT = "{problem}\nReason step by step, and write the final answer inside \\boxed{{}}."
DATA = "hf:HuggingFaceH4/MATH-500:test"
MAX_TOKENS = 1024


def gold(example: Mapping[str, Any]) -> str:
    return f"\\boxed{{{right_answer(example)}}}"


def reward(prompt: str, visible_answer: str, example: Mapping[str, Any]) -> float:
    return float(math_equal(visible_answer, right_answer(example)))


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

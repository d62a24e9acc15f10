"""The right answer to a task: from the environment, or from a column of its row."""

from collections.abc import Callable, Mapping
from typing import Any

from textpolicy.environments.environment import Environment
from textpolicy.errors import TaskError
from textpolicy.rewards.checked_rows import column_text, gold_column_of
from textpolicy.user_code import raise_user_errors_as

ReadRightAnswer = Callable[[Mapping[str, Any]], str | None]
"""Takes a row and returns its right answer, or None if it is not known as one text."""


def right_answer_reader(environment: Environment, gold_column: str | None) -> ReadRightAnswer:
    """Return what reads the right answer of a row: from `gold_column`, if one is named.

    Otherwise the environment's `gold` does, or a column of the usual names.
    """

    def read(example: Mapping[str, Any]) -> str | None:
        if environment.gold and gold_column is None:
            with raise_user_errors_as(TaskError, f"gold of environment {environment.name}"):
                gold = environment.gold(example)
            return gold if isinstance(gold, str) else None
        column = gold_column_of(example) if gold_column is None else gold_column
        return column_text(example, column if column in example else None)

    return read

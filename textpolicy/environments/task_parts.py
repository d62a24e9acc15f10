"""The parts of a task: the functions that draw it and return its gold answers, and its prompt."""

from collections.abc import Callable, Mapping
from random import Random
from typing import Any

from textpolicy.types import Prompt

DrawFn = Callable[[Random], tuple[Prompt, Mapping[str, Any]]]
"""Draws one task: returns its prompt, and the columns that its reward function needs."""

GoldFn = Callable[[Mapping[str, Any]], str | list[str]]
"""Returns the gold answer to an example, or a list with the gold answer of each turn."""


def prompt_text(prompt: Prompt) -> str:
    """Return the prompt as one text for reward functions: the content of its last message."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def gold_for_turn(gold: str | list[str], turn: int) -> str:
    """Return the gold answer of a turn: the last one for turn -1 and for turns past the end."""
    return gold if isinstance(gold, str) else gold[min(turn, len(gold) - 1)]

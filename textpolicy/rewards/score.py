"""One call of a reward function, with its answer checked."""

import math
from collections.abc import Mapping
from numbers import Real
from types import FunctionType
from typing import Any

import numpy as np

from textpolicy.errors import RewardError
from textpolicy.rewards.faults import user_code
from textpolicy.types import RewardFn

_EXCERPT = 60


def score(
    reward: RewardFn, prompt: str, completion: str, example: Mapping[str, Any]
) -> float | None:
    """The reward of one completion: a finite number, or None for a sample not to be scored."""
    sample = f"on prompt {_excerpt(prompt)}, completion {_excerpt(completion)}"
    with user_code(f"reward {name_of(reward)}", file=_file_of(reward), sample=sample):
        # Whatever its annotation promises: this is the user's code.
        value: Any = reward(prompt, completion, example)
    if value is None:
        return None
    number = _to_float(value)
    if not math.isfinite(number):
        # Python refuses to spell out integers of thousands of digits.
        shown = f"{number}" if isinstance(value, int) else f"{value!r}"
        raise RewardError(
            f"reward {name_of(reward)} returned {shown} ({type(value).__name__}); expected a "
            f"finite number, or None to leave the sample out\n  {sample}"
        )
    return number


def _to_float(value: Any) -> float:
    """NaN for what is no real number, infinity for a number beyond a float."""
    if not isinstance(value, Real | np.bool_):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf


def name_of(reward: RewardFn) -> str:
    """What messages call a reward: a function's name, or the type of another callable."""
    return reward.__name__ if isinstance(reward, FunctionType) else type(reward).__name__


def _file_of(reward: RewardFn) -> str:
    return reward.__code__.co_filename if isinstance(reward, FunctionType) else ""


def _excerpt(text: str) -> str:
    return repr(text if len(text) <= _EXCERPT else text[:_EXCERPT] + "…")

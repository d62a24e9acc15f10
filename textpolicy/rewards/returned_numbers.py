"""Reading what a reward returns: a finite number, None, or a `Score` of these and metrics.

The answer of a reward may be any object, and its methods are the user's code: they may raise. Call
these functions where errors of the user's code are handled.
"""

import math
from collections.abc import Mapping
from decimal import Decimal
from numbers import Real
from typing import Any

from textpolicy.rewards.reward_function import Score
from textpolicy.user_code import describe_value

MAX_REWARD = 1e12
"""Rewards beyond this have no place in float32, in which advantages are computed: their squares
come near its largest number, and differences below a hundred thousand disappear."""
_MAX_METRIC = 1e100
_MAX_METRICS, _MAX_NAME_LENGTH = 100, 100
_ARRAY_LIBRARIES = ("numpy", "mlx", "torch", "jax", "jaxlib")


def read_answer(answer: Any) -> tuple[float | None, dict[str, float]] | str:
    """Return the reward and its metrics, or a text that says what was returned and expected."""
    if not isinstance(answer, Score):
        return _read_reward(answer, {})
    metrics = check_metrics(answer.metrics)
    return (
        f"a Score with {metrics}"
        if isinstance(metrics, str)
        else _read_reward(answer.value, metrics)
    )


def check_metrics(given: Any) -> dict[str, float] | str:
    """Return the metrics as floats, or a text that says what was given and expected."""
    if not isinstance(given, Mapping):
        return f"the metrics {describe_value(given)}; expected a mapping of names and numbers"
    metrics = dict(given)
    if len(metrics) > _MAX_METRICS:
        return f"{len(metrics)} metrics; expected at most {_MAX_METRICS}"
    for name, value in metrics.items():
        if type(name) is not str or not 0 < len(name) <= _MAX_NAME_LENGTH or not name.isprintable():
            return (
                f"a metric named {describe_value(name)}; expected a text of 1 to "
                f"{_MAX_NAME_LENGTH} printable characters"
            )
        if not abs(number := to_number(value)) <= _MAX_METRIC:
            return (
                f"the metric {name!r} {describe_value(value)}; expected a finite number from "
                f"-{_MAX_METRIC:g} to {_MAX_METRIC:g}"
            )
        metrics[name] = number
    return metrics


def _read_reward(
    value: Any, metrics: dict[str, float]
) -> tuple[float | None, dict[str, float]] | str:
    if value is None:
        return None, metrics
    if abs(number := to_number(value)) <= MAX_REWARD:
        return number, metrics
    return (
        f"{describe_value(value)}; expected a finite number from -1e12 to "
        "1e12, or None to leave the sample out"
    )


def to_number(value: Any) -> float:
    """Return the number; NaN if `value` is not a real number, infinity if it exceeds a float.

    An array without axes, such as the mean of an mlx array, is a number too.
    """
    # Importing the libraries of the arrays to check would slow each process's start.
    library = type.__dict__["__module__"].__get__(type(value)).partition(".")[0]
    if library in _ARRAY_LIBRARIES and tuple(value.shape) == ():
        value = value.item()
    if not isinstance(value, Real | Decimal):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf

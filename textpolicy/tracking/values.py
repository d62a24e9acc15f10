"""From whatever measured something to the numbers that a sink takes, and that JSON can hold."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from textpolicy.types import Metrics


def to_floats(values: Mapping[str, object]) -> tuple[Metrics, list[str]]:
    """The values as floats, and the names of those that are none.

    A mapping's values come under NAME/KEY. Several numbers become NAME/mean, /std, /min and /max.
    """
    metrics: Metrics = {}
    left_out: list[str] = []
    for name, value in _leaves("", values):
        array = _array(value)
        if array is None:
            left_out.append(name)
        elif array.size == 1:
            metrics[name] = float(array.item())
        else:
            metrics |= {f"{name}/{which}": number for which, number in _spread(array).items()}
    return metrics, left_out


def to_json_number(value: float) -> float | str:
    """JSON has no NaN and no infinity: they are the strings that `float()` reads back."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _leaves(prefix: str, values: Mapping[Any, object]) -> Iterator[tuple[str, object]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(f"{prefix}{key}/", value)
        else:
            yield f"{prefix}{key}", value


def _array(value: object) -> np.ndarray | None:
    """The value as an array of at least one float64, or None if it holds anything else."""
    if isinstance(value, mx.array):
        # numpy does not know bfloat16.
        value = value.astype(mx.float32).tolist()
    if not isinstance(value, int | float | np.generic | np.ndarray | list | tuple):
        return None
    try:
        array = np.asarray(value)
    except ValueError:
        return None
    return array.astype(np.float64) if array.dtype.kind in "biuf" and array.size else None


def _spread(array: np.ndarray) -> Metrics:
    return {
        "mean": float(array.mean()),
        "std": float(array.std()),
        "min": float(array.min()),
        "max": float(array.max()),
    }

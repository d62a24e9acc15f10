"""Conversion of measured values to floats, and of floats to numbers that JSON can hold."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from textpolicy.types import Metrics

_REDUCTIONS = {"mean": np.mean, "std": np.std, "min": np.min, "max": np.max}


def to_floats(values: Mapping[str, object]) -> tuple[Metrics, list[str]]:
    """Return the values as floats, and the names of the values that are not numbers.

    The values of a nested mapping are named NAME/KEY. An array of several numbers becomes
    NAME/mean, NAME/std, NAME/min and NAME/max.
    """
    metrics: Metrics = {}
    left_out: list[str] = []
    for name, value in _flatten("", values):
        array = _to_array(value)
        if array is None:
            left_out.append(name)
        elif array.size == 1:
            metrics[name] = float(array.item())
        else:
            metrics |= {f"{name}/{key}": float(of(array)) for key, of in _REDUCTIONS.items()}
    return metrics, left_out


def to_json_number(value: float) -> float | str:
    """Return the number, or the string that `float()` reads back for NaN and infinity."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _flatten(prefix: str, values: Mapping[Any, object]) -> Iterator[tuple[str, object]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(f"{prefix}{key}/", value)
        else:
            yield f"{prefix}{key}", value


def _to_array(value: object) -> np.ndarray | None:
    """Return the value as a float64 array, or None if it is empty or not of numbers."""
    if isinstance(value, mx.array):
        # numpy has no bfloat16.
        value = value.astype(mx.float32).tolist()
    if not isinstance(value, int | float | np.generic | np.ndarray | list | tuple):
        return None
    try:
        array = np.asarray(value)
    except ValueError:
        return None
    return array.astype(np.float64) if array.dtype.kind in "biuf" and array.size else None

"""Values that depend on a layer's weights alone, computed once for many decode steps."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from operator import is_

import mlx.core as mx
import mlx.nn as nn


@dataclass(frozen=True)
class WeightValue:
    """A value, and the arrays that it was computed from."""

    arrays: Sequence[mx.array]
    value: mx.array


WeightValues = dict[int, WeightValue]
"""The values of layers by the layers' ids."""

_KEPT: ContextVar[WeightValues | None] = ContextVar("weight values", default=None)


@contextmanager
def keep_weight_values(values: WeightValues) -> Generator[None]:
    """Keep in `values` what layers compute in this block of their weights alone.

    A layer that has other arrays computes its value again. What is changed in place is not noticed.
    """
    token = _KEPT.set(values)
    try:
        yield
    finally:
        _KEPT.reset(token)


def weight_value(
    layer: nn.Module, arrays: Sequence[mx.array], compute: Callable[[], mx.array]
) -> mx.array:
    """Return what is computed from these arrays, or what was kept of it."""
    kept = _KEPT.get()
    if kept is None:
        return compute()
    known = kept.get(id(layer))
    same_count = known is not None and len(known.arrays) == len(arrays)
    if known is None or not same_count or not all(map(is_, known.arrays, arrays)):
        known = kept[id(layer)] = WeightValue(arrays, compute())
    return known.value

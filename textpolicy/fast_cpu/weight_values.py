"""Values of a layer's weights and options alone, computed once for many decode steps.

Layers of adapters use this on a GPU too. It lies here because compiled blocks use it as well.
"""

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import chain
from operator import is_
from typing import Any, NamedTuple, TypeVar

import mlx.nn as nn

_Value = TypeVar("_Value")
WeightValues = dict[int, "_KeptValue"]
"""The values of layers by the layers' ids."""

_KEPT: ContextVar["_Kept | None"] = ContextVar("weight values", default=None)


@contextmanager
def keep_weight_values(values: WeightValues) -> Generator[None]:
    """Keep in `values` what layers compute in this block of their weights and options alone.

    Values that no layer has asked for in this block are dropped at its end. A layer that has
    another array, option or layer in it computes its value again. An array that is changed in place
    is not noticed. The values hold the arrays that they come from.
    """
    kept = _Kept(values, set())
    token = _KEPT.set(kept)
    try:
        yield
    finally:
        _KEPT.reset(token)
    for number in values.keys() - kept.asked:
        del values[number]


def weight_value(layer: nn.Module, compute: Callable[[], _Value]) -> _Value:
    """Return what is computed from this layer, or what was kept of it. A layer has one value."""
    kept = _KEPT.get()
    if kept is None:
        return compute()
    kept.asked.add(id(layer))
    known = kept.values.get(id(layer))
    if known is None or not known.is_current():
        known = kept.values[id(layer)] = _KeptValue(layer, compute())
    return known.value


class _Kept(NamedTuple):
    """The values that are kept, and the ids of the layers that have asked for theirs."""

    values: WeightValues
    asked: set[int]


class _KeptValue:
    """A value, and all layers, arrays and options that it was computed from, as they were.

    To hold the layer keeps its id from being that of another layer.
    """

    def __init__(self, layer: nn.Module, value: Any) -> None:
        self.value = value
        self._layers: list[nn.Module] = []
        self._contents: list[Iterable[Any]] = []
        self._add(layer)
        self._before = [*self._now()]

    def is_current(self) -> bool:
        """Return whether all layers have the same classes and the same objects as before."""
        return all(map(is_, self._now(), self._before))

    def _add(self, container: Any) -> None:
        if isinstance(container, nn.Module):
            self._layers.append(container)
            self._contents.append(vars(container).values())
        values = container.values() if isinstance(container, dict) else container
        self._contents.append(values)
        for value in values:
            if isinstance(value, (dict, list, tuple)):
                self._add(value)

    def _now(self) -> Iterable[Any]:
        # The end is one of the objects: a new one at the end is found, and a missing one.
        return chain(map(type, self._layers), chain.from_iterable(self._contents), (_KeptValue,))

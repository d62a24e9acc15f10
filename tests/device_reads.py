"""Count how often Python reads from the device, each time waiting for what it computes."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

_METHODS = (
    "item",
    "tolist",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "__repr__",
    "__format__",
)
_NUMPY = ("array", "asarray", "ascontiguousarray", "stack", "concatenate")
_WAITS = ("eval", "synchronize")


def reads_of(compute: Callable[[], object], host: Sequence[mx.array] = ()) -> Counter[str]:
    """Return how often `compute` calls each of the usual functions that read arrays of mlx.

    Arrays in `host` do not count: their numbers come from Python, and nothing computes them.
    Reads through the buffer protocol, such as `memoryview(x)` and `numpy_array + x`, are not seen.
    """
    counts: Counter[str] = Counter()

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            counts[name] += name in _WAITS or any(_is_computed(x, host) for x in _flat(args[:1]))
            return function(*args, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for owner, names in (
            (mx.array, _METHODS),
            (mx, _WAITS),
            (np, _NUMPY),
        ):
            for name in names:
                patch.setattr(owner, name, counted(name, getattr(owner, name)))
        compute()
    return +counts


def _flat(values: Any) -> list[Any]:
    return [one for x in values for one in (x if isinstance(x, list | tuple) else [x])]


def _is_computed(x: Any, host: Sequence[mx.array]) -> bool:
    return isinstance(x, mx.array) and not any(x is one for one in host)

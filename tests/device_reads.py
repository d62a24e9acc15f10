"""Count how often Python reads from the device, each time waiting for what it computes."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

_METHODS = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__")
_WAITS = ("eval", "synchronize")


def reads_of(compute: Callable[[], object], host: Sequence[mx.array] = ()) -> Counter[str]:
    """Return how often `compute` calls each function that reads arrays of mlx.

    Arrays in `host` do not count: their numbers come from Python, and nothing computes them.
    """
    counts: Counter[str] = Counter()

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            if name in _WAITS or (
                isinstance(args[0], mx.array) and not any(args[0] is one for one in host)
            ):
                counts[name] += 1
            return function(*args, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for owner, names in (
            (mx.array, _METHODS),
            (mx, _WAITS),
            (np, ("array", "asarray")),
        ):
            for name in names:
                patch.setattr(owner, name, counted(name, getattr(owner, name)))
        compute()
    return counts

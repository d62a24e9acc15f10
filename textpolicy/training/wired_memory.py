"""Memory that stays where the device is."""

from collections.abc import Generator
from contextlib import contextmanager

import mlx.core as mx
from mlx_lm.utils import maybe_set_recommended_wired_limit


@contextmanager
def wired_memory() -> Generator[None, None, None]:
    """Inside, a Metal device keeps as much of mlx's memory resident as it recommends.

    Without it, macOS may page out weights between two steps. Other devices know no such limit.
    """
    before = maybe_set_recommended_wired_limit()
    try:
        yield
    finally:
        if before is not None:
            mx.synchronize()
            mx.set_wired_limit(before)

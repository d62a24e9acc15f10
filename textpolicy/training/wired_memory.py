"""Wired memory: memory of a Metal device that macOS may not page out."""

from collections.abc import Generator
from contextlib import contextmanager

import mlx.core as mx
from mlx_lm.utils import maybe_set_recommended_wired_limit


@contextmanager
def keep_memory_wired() -> Generator[None, None, None]:
    """Keep as much of mlx's memory wired as the Metal device recommends, until the block ends.

    Without a limit, macOS may page out weights between two steps. Other devices have no such limit.
    """
    before = maybe_set_recommended_wired_limit()
    try:
        yield
    finally:
        if before is not None:
            mx.synchronize()
            mx.set_wired_limit(before)

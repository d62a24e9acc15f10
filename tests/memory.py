"""The most memory that something takes."""

import gc
from collections.abc import Callable

import mlx.core as mx


def peak_of(compute: Callable[[], object], before: int | None = None) -> int:
    """The most bytes while it runs, above those of `before`, or above what is there."""
    # What earlier tests left in cycles might otherwise be freed meanwhile.
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    there = mx.get_active_memory() if before is None else before
    compute()
    return mx.get_peak_memory() - there

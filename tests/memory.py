"""Measure peak memory."""

import gc
from collections.abc import Callable

import mlx.core as mx


def peak_of(compute: Callable[[], object], before: int | None = None) -> int:
    """Return the peak bytes of `compute` above `before`, by default above the bytes in use."""
    # Reference cycles of earlier tests could otherwise be freed during the measurement.
    gc.collect()
    # What the device still computes holds arrays too.
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    in_use = mx.get_active_memory() if before is None else before
    compute()
    return mx.get_peak_memory() - in_use

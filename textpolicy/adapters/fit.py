"""Whether tensors fit a model's adapters: every reason why not, at once."""

from collections.abc import Iterable, Iterator, Mapping

import mlx.core as mx
import numpy as np

_SHOWN = 8


def misfits(model: Mapping[str, mx.array], given: Mapping[str, mx.array]) -> list[str]:
    """One line for each tensor that is missing, unknown, misshapen, not float or not finite."""
    shared = [(name, given[name], model[name]) for name in model if name in given]
    floats = {name: array for name, array, _ in shared if mx.issubdtype(array.dtype, mx.floating)}
    return [
        *_shorten(f"{name}: missing" for name in model if name not in given),
        *_shorten(f"{name}: no such adapter in the model" for name in given if name not in model),
        *_shorten(
            f"{name}: shape {array.shape}, model has {own.shape}"
            for name, array, own in shared
            if array.shape != own.shape
        ),
        *_shorten(
            f"{name}: {array.dtype}, expected floating point"
            for name, array, _ in shared
            if name not in floats
        ),
        *_shorten(f"{name}: not finite" for name, array in floats.items() if not _finite(array)),
    ]


def _finite(array: mx.array) -> bool:
    # numpy looks at hundreds of small arrays ten times as fast as mlx schedules them.
    return bool(np.isfinite(np.array(array.astype(mx.float32), copy=False)).all())


def _shorten(lines: Iterable[str]) -> Iterator[str]:
    every = sorted(lines)
    yield from every[:_SHOWN]
    if len(every) > _SHOWN:
        yield f"... and {len(every) - _SHOWN} more like the last line"

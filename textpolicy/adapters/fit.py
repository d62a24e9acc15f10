"""Whether tensors fit a model's adapters: every reason why not, at once."""

from collections.abc import Iterable, Iterator, Mapping

import mlx.core as mx

_SHOWN = 8


def misfits(model: Mapping[str, mx.array], given: Mapping[str, mx.array]) -> list[str]:
    """One line for each tensor that is missing, unknown, misshapen, not float or not finite."""
    shared = [(name, given[name], model[name]) for name in model if name in given]
    fitting = {name: array for name, array, _ in shared if mx.issubdtype(array.dtype, mx.floating)}
    finite = {name: mx.isfinite(array).all() for name, array in fitting.items()}
    mx.eval(finite)
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
            if name not in fitting
        ),
        *_shorten(f"{name}: not finite" for name, holds in finite.items() if not holds),
    ]


def _shorten(lines: Iterable[str]) -> Iterator[str]:
    every = sorted(lines)
    yield from every[:_SHOWN]
    if len(every) > _SHOWN:
        yield f"... and {len(every) - _SHOWN} more like the last line"

"""Fusing: adding adapters to the weights, and measuring how much survives rounding."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from textpolicy.adapters.layers.adapter_layer import AdapterLayer
from textpolicy.adapters.quantization.number_formats import format_by_name
from textpolicy.adapters.quantization.quantize import quantize_module
from textpolicy.adapters.quantization.stored_weights import (
    float_dtype,
    float_weight,
    format_of,
    make_float_module,
)
from textpolicy.errors import AdapterError

SAME_FORMAT = "same"
"""The `qtype` that quantizes each module to its present number format. Floats stay float."""
_MAX_LINES = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class FusedModule:
    """`survival` is the fraction of the update that is left after rounding to `dtype`.

    It is measured along the update: 1 is all of it, 0 is nothing. `noise` is the norm of the
    rounding error divided by the norm of the update. `relative_size` is the norm of the update
    divided by the norm of the base weight. An update of zero has survival 1 and noise 0.
    """

    path: str
    dtype: str
    relative_size: float
    survival: float
    noise: float
    squared_norm: float


@dataclass(frozen=True, kw_only=True, slots=True)
class FuseReport:
    """The result for each fused module."""

    modules: Sequence[FusedModule]

    @property
    def survival(self) -> float:
        """The fraction of the whole update that survives."""
        total = sum(module.squared_norm for module in self.modules)
        kept = sum(module.squared_norm * module.survival for module in self.modules)
        return kept / total if total else 1.0

    @property
    def noise(self) -> float:
        """The norm of all rounding errors divided by the norm of the whole update."""
        total = sum(module.squared_norm for module in self.modules)
        changed = sum(module.squared_norm * module.noise**2 for module in self.modules)
        return (changed / total) ** 0.5 if total else 0.0

    @property
    def worst(self) -> FusedModule:
        """The module that loses most."""
        return min(self.modules, key=lambda module: module.survival)

    def check(self, min_survival: float) -> None:
        """Raise AdapterError if less than this fraction of the update survives."""
        if self.survival >= min_survival:
            return
        losers = sorted(self.modules, key=lambda module: module.survival)[:_MAX_LINES]
        lines = [
            f"{module.path}: {module.survival:.0%} of an update of relative size "
            f"{module.relative_size:.1e} is left in {module.dtype}"
            for module in losers
        ]
        text = "\n  ".join([f"Fusing would keep {self.survival:.0%} of the update", *lines])
        raise AdapterError(
            f"{text}\nExpected at least {min_survival:.0%}. Nothing was changed. Fuse into more "
            "bits (dtype=mx.float32 keeps all), keep the adapters apart from the base, or accept "
            "the loss with min_survival=0"
        )


def fuse_layer(
    path: str, layer: AdapterLayer, dtype: mx.Dtype | None, qtype: str | None
) -> tuple[nn.Module, FusedModule]:
    """Return a plain module that computes what `layer` does up to rounding, and how much survived.

    The module is float unless `qtype` names a number format. Error messages show `path`.
    """
    if qtype == SAME_FORMAT:
        number_format = format_of(layer.base)
    else:
        number_format = format_by_name(qtype) if qtype is not None else None
    base, delta = float_weight(layer.base), layer.delta()
    dtype = dtype or float_dtype(layer.base)
    fused = make_float_module(layer.base, (base + delta).astype(dtype), layer.merged_bias())
    if number_format:
        fused = quantize_module(path, fused, number_format)
    mx.eval(fused.parameters())
    name = number_format.name if number_format else str(dtype).removeprefix("mlx.core.")
    rounded = float_weight(fused)
    return fused, measure_survival(path, name, base=base, delta=delta, rounded=rounded)


def measure_survival(
    path: str, dtype: str, *, base: mx.array, delta: mx.array, rounded: mx.array
) -> FusedModule:
    """Return how much of an update `delta` of the weight `base` is left in the `rounded` weight."""
    moved = rounded - base
    squared, kept, size = mx.square(delta).sum(), (moved * delta).sum(), mx.linalg.norm(base)
    noise = mx.linalg.norm(moved - delta)
    mx.eval(squared, kept, size, noise)
    squared_norm = float(squared)
    return FusedModule(
        path=path,
        dtype=dtype,
        relative_size=squared_norm**0.5 / float(size),
        survival=float(kept) / squared_norm if squared_norm else 1.0,
        noise=float(noise) / squared_norm**0.5 if squared_norm else 0.0,
        squared_norm=squared_norm,
    )

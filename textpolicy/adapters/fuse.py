"""Adapters added into the weights, and how much of them the weights' dtype could hold."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from textpolicy.adapters.layers.adapter_layer import AdapterLayer
from textpolicy.adapters.quantization.number_formats import NumberFormat, format_by_name
from textpolicy.adapters.quantization.quantize import pack_module
from textpolicy.adapters.quantization.stored_weights import (
    float_dtype,
    float_module,
    float_weight,
    format_of,
)
from textpolicy.errors import AdapterError

SAME = "same"
_SHOWN = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class FusedModule:
    """`survival` is the fraction of the update that is left after rounding to `dtype`.

    It is measured along the update: 1 is all of it, 0 none. `noise` is the norm of what rounding
    added or took, over the update's own. `relative_size` is the update's norm over the base
    weight's. An update of zero survives whole, without noise.
    """

    path: str
    dtype: str
    relative_size: float
    survival: float
    noise: float
    squared_norm: float


@dataclass(frozen=True, kw_only=True, slots=True)
class FuseReport:
    """What became of the adapters of each module."""

    modules: Sequence[FusedModule]

    @property
    def survival(self) -> float:
        """The fraction of the whole update that survives."""
        total = sum(module.squared_norm for module in self.modules)
        kept = sum(module.squared_norm * module.survival for module in self.modules)
        return kept / total if total else 1.0

    @property
    def noise(self) -> float:
        """The norm of what rounding changed, over that of the whole update."""
        total = sum(module.squared_norm for module in self.modules)
        changed = sum(module.squared_norm * module.noise**2 for module in self.modules)
        return (changed / total) ** 0.5 if total else 0.0

    @property
    def worst(self) -> FusedModule:
        """The module that loses most."""
        return min(self.modules, key=lambda module: module.survival)

    def check(self, min_survival: float) -> None:
        """Raise if less than this fraction of the update survives."""
        if self.survival < min_survival:
            losers = sorted(self.modules, key=lambda module: module.survival)[:_SHOWN]
            lines = [
                f"{module.path}: {module.survival:.0%} of an update of relative size "
                f"{module.relative_size:.1e} is left in {module.dtype}"
                for module in losers
            ]
            text = "\n  ".join([f"fusing would keep {self.survival:.0%} of the update", *lines])
            raise AdapterError(
                f"{text}\nExpected at least {min_survival:.0%}. Nothing was changed. Fuse into "
                "more bits (dtype=mx.float32 keeps all), keep the adapters beside the base, or "
                "accept the loss with min_survival=0"
            )


def fuse_layer(
    path: str, layer: AdapterLayer, dtype: mx.Dtype | None, qtype: str | None
) -> tuple[nn.Module, FusedModule]:
    """A plain module that computes what `layer` does, up to rounding; float unless `qtype`."""
    form = _format(layer.base, qtype)
    base, delta = float_weight(layer.base), layer.delta()
    dtype = dtype or float_dtype(layer.base)
    fused = float_module(layer.base, (base + delta).astype(dtype), layer.merged_bias())
    if form:
        fused = pack_module(path, fused, form)
    moved = float_weight(fused) - base
    squared, kept, size = mx.square(delta).sum(), (moved * delta).sum(), mx.linalg.norm(base)
    noise = mx.linalg.norm(moved - delta)
    mx.eval(fused.parameters(), squared, kept, size, noise)
    norm2 = float(squared)
    return fused, FusedModule(
        path=path,
        dtype=form.name if form else str(dtype).removeprefix("mlx.core."),
        relative_size=norm2**0.5 / float(size),
        survival=float(kept) / norm2 if norm2 else 1.0,
        noise=float(noise) / norm2**0.5 if norm2 else 0.0,
        squared_norm=norm2,
    )


def _format(base: nn.Module, qtype: str | None) -> NumberFormat | None:
    """The format to round to again; float modules stay float under "same"."""
    if qtype is None:
        return None
    return format_of(base) if qtype == SAME else format_by_name(qtype)

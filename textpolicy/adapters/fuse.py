"""Adapters added into the weights, and how much of them the weights' dtype could hold."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from textpolicy.adapters.layers import AdapterLayer
from textpolicy.adapters.quantization import float_dtype, float_module, float_weight


@dataclass(frozen=True, kw_only=True, slots=True)
class FusedModule:
    """`survival` is the fraction of the update that is left after rounding to `dtype`.

    It is measured along the update: 1 is all of it, 0 none. `relative_size` is the update's norm
    over the base weight's. An update of zero survives whole.
    """

    path: str
    dtype: str
    relative_size: float
    survival: float
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
    def worst(self) -> FusedModule:
        """The module that loses most."""
        return min(self.modules, key=lambda module: module.survival)


def fuse_layer(
    path: str, layer: AdapterLayer, dtype: mx.Dtype | None
) -> tuple[nn.Module, FusedModule]:
    """A plain module that computes what `layer` does; a packed base becomes a float one."""
    base, delta = float_weight(layer.base), layer.delta()
    dtype = dtype or float_dtype(layer.base)
    weight = (base + delta).astype(dtype)
    moved = weight.astype(mx.float32) - base
    squared, kept, size = mx.square(delta).sum(), (moved * delta).sum(), mx.linalg.norm(base)
    fused = float_module(layer.base, weight, layer.merged_bias())
    mx.eval(fused.parameters(), squared, kept, size)
    norm2 = float(squared)
    return fused, FusedModule(
        path=path,
        dtype=str(dtype).removeprefix("mlx.core."),
        relative_size=norm2**0.5 / float(size),
        survival=float(kept) / norm2 if norm2 else 1.0,
        squared_norm=norm2,
    )

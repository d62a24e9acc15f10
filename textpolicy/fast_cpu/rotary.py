"""Rotary embeddings that compute the angles of a decode step once, not in every layer.

On a CPU, mlx computes the cosines and sines of all positions anew for the queries and for the keys
of each layer, by thirty operations. In a decode step all layers are at the same positions.
"""

import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Float, Int

from textpolicy.fast_cpu.gradients import are_gradients_needed
from textpolicy.fast_cpu.mlx_operations import operation_for

RowsOfHeads = Float[mx.array, "*rows heads time width"]
Angles = Float[mx.array, "rows 1 1 2 half"]


class _Step:
    """The equal positions of all layers in a step, and the angles that layers have asked for."""

    def __init__(self, positions: Sequence[Int[mx.array, " rows"]]) -> None:
        self._positions = positions
        self._numbers = {id(one) for one in positions}
        self._angles: dict[tuple[int, float, float], tuple[Angles, Angles]] = {}

    def begins_at(self, offset: Any) -> bool:
        """Return whether this is a layer's array of positions at the beginning of the step."""
        return id(offset) in self._numbers

    def angles(self, dims: int, base: float, scale: float) -> tuple[Angles, Angles]:
        """Return the cosine of each angle twice, and its sine with a minus and a plus."""
        key = dims, base, scale
        if key not in self._angles:
            half = dims // 2
            frequencies = mx.exp(mx.arange(0, -half, -1, mx.float32) * (math.log(base) / half))
            angle = (self._positions[0] * scale)[:, None, None, None, None] * frequencies
            cosine, sine = mx.cos(angle), mx.sin(angle)
            self._angles[key] = (
                mx.concatenate([cosine, cosine], axis=-2),
                mx.concatenate([-sine, sine], axis=-2),
            )
        return self._angles[key]


_STEP: ContextVar[_Step | None] = ContextVar("step", default=None)


@contextmanager
def one_step(positions: Sequence[Int[mx.array, " rows"]]) -> Generator[None]:
    """Say that these arrays, one of each layer, have equal positions, with one token for each row.

    Without any array, the layers compute their angles themselves.
    """
    token = _STEP.set(_Step(positions))
    try:
        yield
    finally:
        _STEP.reset(token)


class FastRoPE(nn.RoPE):
    """`nn.RoPE`, which takes the angles of a decode step from the step."""

    def __call__(self, x: RowsOfHeads, offset: Any = 0) -> RowsOfHeads:
        step = _STEP.get()
        whole = x.dtype == mx.float32 and x.shape[-1] == self.dims and not self.traditional
        if step is None or not whole or self.base <= 0 or not step.begins_at(offset):
            return super().__call__(x, offset)
        cosine, sine = step.angles(self.dims, self.base, self.scale)
        if (
            not are_gradients_needed()
            and len(x) == len(cosine)
            and (compiled := operation_for("rotation", x, vectors=2, least_width=2))
        ):
            return compiled(x, cosine, sine, numbers=(math.prod(x.shape[1:-1]),))[0]
        # The halves of a head are rotated together: x cos + (second half, first half) (-sin, sin).
        halves = x.reshape(*x.shape[:-1], 2, -1)
        return (halves * cosine + halves[..., ::-1, :] * sine).reshape(x.shape)

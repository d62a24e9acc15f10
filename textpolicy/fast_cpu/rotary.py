"""Rotary embeddings that compute the angles of a step once, not in every layer.

On a CPU, mlx computes the cosines and sines of all positions anew for the queries and for the keys
of each layer, by thirty operations. In a forward pass all layers are at the same positions.
"""

import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Float, Int

from textpolicy.fast_cpu.gradients import are_gradients_needed, with_gradient
from textpolicy.fast_cpu.mlx_operations import compiled_operation, operation_for

RowsOfHeads = Float[mx.array, "*rows heads time width"]
Angles = Float[mx.array, "rows 1 1 2 half"]
_Heads = Float[mx.array, "rows heads time width"]
_HeadsByTime = Float[mx.array, "rows time heads width"]
_AnglesOfPositions = Float[mx.array, "rows time half"]


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
            angle = (self._positions[0] * scale)[:, None, None, None, None] * _frequencies(
                dims, base
            )
            cosine, sine = mx.cos(angle), mx.sin(angle)
            self._angles[key] = (
                mx.concatenate([cosine, cosine], axis=-2),
                mx.concatenate([-sine, sine], axis=-2),
            )
        return self._angles[key]


def _frequencies(dims: int, base: float) -> Float[mx.array, " half"]:
    half = dims // 2
    return mx.exp(mx.arange(0, -half, -1, mx.float32) * (math.log(base) / half))


@dataclass
class _Pass:
    """The angles that layers have asked for in a forward pass, with the offsets they came from."""

    known: dict[Any, tuple[Any, _AnglesOfPositions, _AnglesOfPositions]] = field(
        default_factory=dict
    )

    def angles(
        self, offset: Any, time: int, dims: int, base: float, scale: float
    ) -> tuple[_AnglesOfPositions, _AnglesOfPositions]:
        """Return the cosines and the sines of `time` positions from each row's offset on."""
        # By identity: to compare arrays would wait for them. The array is kept, so its id is too.
        key = (id(offset) if isinstance(offset, mx.array) else offset), time, dims, base, scale
        if key not in self.known:
            first = mx.array(offset).reshape(-1, 1) if offset is not None else 0
            angle = ((first + mx.arange(time)) * scale)[..., None] * _frequencies(dims, base)
            self.known[key] = offset, mx.cos(angle), mx.sin(angle)
        _, cosine, sine = self.known[key]
        return cosine, sine


_STEP: ContextVar[_Step | None] = ContextVar("step", default=None)
_PASS: ContextVar[_Pass | None] = ContextVar("pass", default=None)


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


@contextmanager
def one_pass() -> Generator[None]:
    """Say that layers in this block have equal angles where they have the same offset.

    No array of offsets may be changed in place in the block.
    """
    token = _PASS.set(_Pass())
    try:
        yield
    finally:
        _PASS.reset(token)


class FastRoPE(nn.RoPE):
    """`nn.RoPE`, which takes the angles of a step from the step."""

    def __call__(self, x: RowsOfHeads, offset: Any = 0) -> RowsOfHeads:
        if x.dtype != mx.float32 or x.shape[-1] != self.dims:
            return super().__call__(x, offset)
        if angles := self.angles_of_step(offset):
            return _turn_in_step(x, *angles)
        pairs = self.dims % 2 == 0 and not self.traditional
        whole = x.ndim == 4 and x.shape[2] > 1 and self.base > 0 and pairs
        if whole and operation_for("rotation_of_positions", x, least_width=2):
            angles = (_PASS.get() or _Pass()).angles(
                offset, x.shape[2], self.dims, self.base, self.scale
            )
            if len(angles[0]) in (1, len(x)):
                return _turned(*angles)(x).swapaxes(1, 2)
        return super().__call__(x, offset)

    def angles_of_step(self, offset: Any) -> tuple[Angles, Angles] | None:
        """Return the cosines and sines if this is the array of a step's positions, else None."""
        step = _STEP.get()
        if step is None or self.traditional or self.base <= 0 or not step.begins_at(offset):
            return None
        return step.angles(self.dims, self.base, self.scale)


def _turn_in_step(x: RowsOfHeads, cosine: Angles, sine: Angles) -> RowsOfHeads:
    if (
        not are_gradients_needed()
        and len(x) == len(cosine)
        and (compiled := operation_for("rotation", x, vectors=2, least_width=2))
    ):
        return compiled(x, cosine, sine, numbers=(math.prod(x.shape[1:-1]),))[0]
    # The halves of a head are rotated together: x cos + (second half, first half) (-sin, sin).
    halves = x.reshape(*x.shape[:-1], 2, -1)
    return (halves * cosine + halves[..., ::-1, :] * sine).reshape(x.shape)


def _turned(cosine: _AnglesOfPositions, sine: _AnglesOfPositions) -> Any:
    """Return the function that turns heads, and puts their positions before the heads."""

    def turn(x: _Heads, sign: int = 1) -> _HeadsByTime:
        rows, heads, time, width = x.shape
        operation = compiled_operation("rotation_of_positions", 3, as_stored=True)
        numbers = rows, heads, time, width, sign
        return operation((x, cosine, sine), [(rows, time, heads, width)], numbers)[0]

    def gradient(_: Any, cotangent: _HeadsByTime, __: _HeadsByTime) -> _Heads:
        return turn(cotangent.swapaxes(1, 2), -1).swapaxes(1, 2)

    return with_gradient(turn, gradient)

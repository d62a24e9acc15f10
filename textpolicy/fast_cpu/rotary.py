"""Rotary embeddings that compute the angles of a step once, not in every layer.

On a CPU, mlx computes the cosines and sines of all positions anew for the queries and for the keys
of each layer, by thirty operations. In a forward pass all layers are at the same positions.
"""

import math
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from jaxtyping import Float, Int, Num
from mlx_lm.models.rope_utils import Llama3RoPE, YarnRoPE

from textpolicy.fast_cpu.gradients import are_gradients_needed, with_gradient
from textpolicy.fast_cpu.mlx_operations import compiled_operation, operation_for

RowsOfHeads = Float[mx.array, "*rows heads time width"]
Angles = Float[mx.array, "rows 1 1 2 half"]
_Heads = Float[mx.array, "rows heads time width"]
_HeadsByTime = Float[mx.array, "rows time heads width"]
_AnglesOfPositions = Float[mx.array, "rows time half"]


@dataclass(frozen=True)
class _Turns:
    """How far a layer turns each pair of a head from one position to the next.

    Positions are stretched by one factor, and heads are scaled by another. Layers with equal keys
    turn equally.
    """

    key: Any
    frequencies: Callable[[], Float[mx.array, " half"]]
    stretch: float = 1.0
    scale: float = 1.0

    def angles(
        self, positions: Num[mx.array, "*positions"]
    ) -> tuple[Float[mx.array, "*positions half"], Float[mx.array, "*positions half"]]:
        """Return the cosines and the sines of all pairs at these positions, scaled."""
        angle = (positions * self.stretch)[..., None] * self.frequencies()
        cosine, sine = mx.cos(angle), mx.sin(angle)
        return (cosine, sine) if self.scale == 1 else (cosine * self.scale, sine * self.scale)


class _StepPositions:
    """The equal positions of all layers in a step, and the angles that layers have asked for."""

    def __init__(self, positions: Sequence[Int[mx.array, " rows"]]) -> None:
        self._positions = positions
        self._numbers = {id(one) for one in positions}
        self._angles: dict[Any, tuple[Angles, Angles]] = {}
        self._next: Int[mx.array, " rows"] | None = None

    def begins_at(self, offset: Any) -> bool:
        """Return whether this is a layer's array of positions at the beginning of the step."""
        return id(offset) in self._numbers

    def angles(self, turns: _Turns) -> tuple[Angles, Angles]:
        """Return the cosine of each angle twice, and its sine with a minus and a plus."""
        if turns.key not in self._angles:
            cosine, sine = turns.angles(self._positions[0][:, None, None, None])
            self._angles[turns.key] = (
                mx.concatenate([cosine, cosine], axis=-2),
                mx.concatenate([-sine, sine], axis=-2),
            )
        return self._angles[turns.key]

    @property
    def next_positions(self) -> Int[mx.array, " rows"]:
        """The positions of the next step, as an array that nobody else has."""
        if self._next is None:
            self._next = self._positions[0] + 1
        # Some functions of mlx-lm change the array of a layer.
        return mx.array(self._next)


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
        self, offset: Any, time: int, turns: _Turns
    ) -> tuple[_AnglesOfPositions, _AnglesOfPositions]:
        """Return the cosines and the sines of `time` positions from each row's offset on."""
        # By identity: to compare arrays would wait for them. The array is kept, so its id is too.
        key = (id(offset) if isinstance(offset, mx.array) else offset), time, turns.key
        if key not in self.known:
            first = mx.array(offset).reshape(-1, 1) if offset is not None else mx.array([[0]])
            self.known[key] = offset, *turns.angles(first + mx.arange(time))
        _, cosine, sine = self.known[key]
        return cosine, sine


_STEP: ContextVar[_StepPositions | None] = ContextVar("step", default=None)
_PASS: ContextVar[_Pass | None] = ContextVar("pass", default=None)


@contextmanager
def one_step(positions: Sequence[Int[mx.array, " rows"]]) -> Generator[None]:
    """Say that these arrays, one of each layer, have equal positions, with one token for each row.

    Without any array, the layers compute their angles themselves.
    """
    token = _STEP.set(_StepPositions(positions))
    try:
        yield
    finally:
        _STEP.reset(token)


def next_positions(offset: Int[mx.array, " rows"]) -> Int[mx.array, " rows"]:
    """Return each row's next position, which all layers of a step compute once."""
    step = _STEP.get()
    return step.next_positions if step and step.begins_at(offset) else offset + 1


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


class FastRotation(nn.Module):
    """What the faster layers have in common: they take the angles of a step from the step."""

    dims: int
    traditional: bool

    def __call__(self, x: RowsOfHeads, offset: Any = 0, *options: Any, **others: Any) -> Any:
        plain: Any = super().__call__
        whole = x.shape[-1] == self.dims and not self.dims % 2
        if x.dtype != mx.float32 or not whole or self.traditional or options or others:
            return plain(x, offset, *options, **others)
        if x.shape[-2] == 1 and (angles := self.angles_of_step(offset)):
            return _turn_in_step(x, *angles)
        several = x.ndim == 4 and x.shape[2] > 1
        compiled = several and operation_for("rotation_of_positions", x, least_width=2)
        if compiled and (turns := self.turns()):
            angles = (_PASS.get() or _Pass()).angles(offset, x.shape[2], turns)
            if len(angles[0]) in (1, len(x)):
                return _turned(*angles)(x).swapaxes(1, 2)
        return plain(x, offset)

    def angles_of_step(self, offset: Any) -> tuple[Angles, Angles] | None:
        """Return the cosines and sines if this is the array of a step's positions, else None."""
        step = _STEP.get()
        if step is None or not step.begins_at(offset) or self.traditional or self.dims % 2:
            return None
        turns = self.turns()
        return step.angles(turns) if turns else None

    def turns(self) -> _Turns | None:
        """Return how this layer turns heads, or None if only mlx computes it."""
        raise NotImplementedError


class FastRoPE(FastRotation, nn.RoPE):
    """`nn.RoPE` with the angles of a step."""

    def turns(self) -> _Turns | None:
        key = dims, base, scale = self.dims, self.base, self.scale
        return _Turns(key, lambda: _frequencies(dims, base), stretch=scale) if base > 0 else None


class FastLlama3RoPE(FastRotation, Llama3RoPE):
    """The scaled embedding of Llama 3.1 with the angles of a step."""

    def turns(self) -> _Turns:
        return _turns_of_periods(self["_freqs"])


class FastYarnRoPE(FastRotation, YarnRoPE):
    """YaRN's embedding with the angles of a step."""

    def turns(self) -> _Turns:
        return _turns_of_periods(self["_freqs"], self.mscale)


FAST_ROTATIONS: dict[type[nn.Module], type[FastRotation]] = {
    nn.RoPE: FastRoPE,
    Llama3RoPE: FastLlama3RoPE,
    YarnRoPE: FastYarnRoPE,
}
"""The faster classes by the classes whose place they take."""


def share_periods(layers: Iterable[nn.Module]) -> None:
    """Let layers that turn equally have one array of periods, so that they share their angles."""
    known: dict[bytes, mx.array] = {}
    for layer in layers:
        if isinstance(layer, (FastLlama3RoPE, FastYarnRoPE)):
            numbers = np.array(layer["_freqs"].astype(mx.float32)).tobytes()
            layer["_freqs"] = known.setdefault(numbers, layer["_freqs"])


def _turns_of_periods(periods: mx.array, scale: float = 1.0) -> _Turns:
    """Return how a layer turns that knows in how many positions each pair turns by a radian."""
    return _Turns((id(periods), scale), lambda: 1 / periods, scale=scale)


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

"""SwiGLU, the gate of most language models' feed-forward layers, with a closed-form gradient."""

from typing import Any

import mlx.core as mx
from jaxtyping import Float
from mlx_lm.models import activations

from textpolicy.fast_cpu.array_slices import apply_in_slices
from textpolicy.fast_cpu.exponential import exp

Features = Float[mx.array, "*batch features"]


def swiglu(gate: Features, x: Features) -> Features:
    """Return silu(gate) x, as mlx-lm's `swiglu` does.

    With s = sigmoid(gate):

        d / dgate = x s (1 + gate (1 - s))        d / dx = gate s
    """
    if gate.dtype != mx.float32 or x.dtype != mx.float32:
        return activations.swiglu(gate, x)
    return _swiglu(gate, x)


def _forward(gate: mx.array, x: mx.array) -> mx.array:
    return apply_in_slices(lambda gate, x: [gate * x / (1 + exp(-gate))], gate, x)[0]


def _backward(
    primals: tuple[mx.array, mx.array], cotangent: mx.array, _: mx.array
) -> list[mx.array]:
    return apply_in_slices(_gradients, *primals, cotangent)


def _gradients(gate: mx.array, x: mx.array, cotangent: mx.array) -> list[mx.array]:
    sigmoid = 1 / (1 + exp(-gate))
    silu_gradient = cotangent * sigmoid
    return [silu_gradient * x * (1 + gate * (1 - sigmoid)), silu_gradient * gate]


_swiglu: Any = mx.custom_function(_forward)
_swiglu.vjp(_backward)

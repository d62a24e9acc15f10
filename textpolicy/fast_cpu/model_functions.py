"""Faster functions for mlx-lm's models on a CPU, with the same values and gradients.

Two functions that mlx-lm's models call spend much of their time in mlx's exponential for CPUs. A
layer that calls one of them gets a subclass of its class: the same code, in which the function's
name stands for the faster function. Norms and rotary embeddings become layers of our own. Other
models and mlx-lm itself do not change.
"""

from functools import cache
from types import FunctionType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Float
from mlx_lm.models import activations, base

from textpolicy.fast_cpu.array_slices import apply_in_slices
from textpolicy.fast_cpu.attention import scaled_dot_product_attention
from textpolicy.fast_cpu.decoder_block import faster_block
from textpolicy.fast_cpu.exponential import SMALL, exp
from textpolicy.fast_cpu.gradients import with_gradient
from textpolicy.fast_cpu.mlx_operations import operation_for
from textpolicy.fast_cpu.rms_norm import FastRMSNorm
from textpolicy.fast_cpu.rotary import FAST_ROTATIONS, share_periods

Features = Float[mx.array, "*batch features"]


def swiglu(gate: Features, x: Features) -> Features:
    """Return silu(gate) x, as mlx-lm's `swiglu` does, with a closed-form gradient.

    With s = sigmoid(gate):

        d / dgate = x s (1 + gate (1 - s))        d / dx = gate s
    """
    if gate.dtype != mx.float32 or x.dtype != mx.float32:
        return activations.swiglu(gate, x)
    if gate.size <= SMALL and not operation_for("swiglu", gate, x):
        return gate * mx.sigmoid(gate) * x
    return _swiglu(gate, x)


def _value(gate: mx.array, x: mx.array) -> mx.array:
    if compiled := operation_for("swiglu", gate, x):
        return compiled(gate, x)[0]
    return apply_in_slices(lambda gate, x: [gate * x / (1 + exp(-gate))], gate, x)[0]


def _gradients(primals: Any, cotangent: mx.array, _: mx.array) -> list[mx.array]:
    if compiled := operation_for("swiglu_gradients", *primals, cotangent, outputs=2):
        return compiled(*primals, cotangent)
    return apply_in_slices(_gradients_of_slice, *primals, cotangent)


def _gradients_of_slice(gate: mx.array, x: mx.array, cotangent: mx.array) -> list[mx.array]:
    sigmoid = 1 / (1 + exp(-gate))
    silu_gradient = cotangent * sigmoid
    return [silu_gradient * x * (1 + gate * (1 - sigmoid)), silu_gradient * gate]


_swiglu = with_gradient(_value, _gradients)
# By identity: a layer's module may hold unhashable objects under the names that the layer uses.
_FASTER = {
    id(base.scaled_dot_product_attention): scaled_dot_product_attention,
    id(activations.swiglu): swiglu,
}

_FASTER_LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.RMSNorm: FastRMSNorm,
    **FAST_ROTATIONS,
}


def use_fast_functions(model: nn.Module) -> None:
    """Let the layers of this model call the faster functions; do nothing on a GPU."""
    if mx.default_device().type != mx.cpu:
        return
    modules = model.modules()
    for module in modules:
        module.__class__ = _faster_class(type(module))
    share_periods(modules)


@cache
def _faster_class(layer: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass that calls the faster functions, or the class if it calls none of them."""
    if layer in _FASTER_LAYERS:
        return _FASTER_LAYERS[layer]
    if block := faster_block(layer, _faster_class):
        return block
    call: Any = layer.__call__
    if not isinstance(call, FunctionType):
        return layer
    called = {name: id(call.__globals__.get(name)) for name in call.__code__.co_names}
    replaced = {name: _FASTER[number] for name, number in called.items() if number in _FASTER}
    if not replaced:
        return layer
    new = FunctionType(call.__code__, call.__globals__ | replaced, None, None, call.__closure__)
    new.__defaults__, new.__kwdefaults__ = call.__defaults__, call.__kwdefaults__
    names = {"__module__": layer.__module__, "__qualname__": layer.__qualname__}
    return type(layer.__name__, (layer,), names | {"__call__": new})

"""Layers that call functions with a gradient in place of mlx-lm's GPU kernels, for a while.

Several models of mlx-lm call kernels that have no gradient. While gradients are computed, a layer
that would call one gets a subclass of its class: the same code, in which the function's name stands
for a function with a gradient. The modes of the layers do not change, so dropout and batch
normalisation stay as they are. Layers of other models, and the sampler, keep the kernels.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cache
from types import FunctionType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from textpolicy.layer_gradients.gated_delta import gated_delta_update
from textpolicy.layer_gradients.wkv7 import wkv7


def _ssm_update_without_kernel(ssm_update: FunctionType) -> Callable[..., Any]:
    # `ssm_update` takes the kernel for single steps only; `ssm_attn` computes any number of steps.
    return ssm_update.__globals__["ssm_attn"]


def _attention_residual_without_kernel(mix: FunctionType) -> Callable[..., Any]:
    return lambda blocks, partial_sum, w_eff, eps, use_kernel=True: mix(
        blocks, partial_sum, w_eff, eps, use_kernel=False
    )


def _sinkhorn_without_kernel(_: FunctionType) -> Callable[..., Any]:
    def sinkhorn(comb: mx.array, *, iters: int, eps: mx.array) -> mx.array:
        for axis in [-2, *[-1, -2] * (iters - 1)]:
            comb = comb / (mx.sum(comb, axis=axis, keepdims=True) + eps)
        return comb

    return sinkhorn


# By full name, because a release of mlx-lm may lack one of the modules. Each value takes mlx-lm's
# function and returns the function with a gradient.
SUBSTITUTES: dict[str, Callable[[FunctionType], Callable[..., Any]]] = {
    "mlx_lm.models.gated_delta.gated_delta_update": lambda _: gated_delta_update,
    "mlx_lm.models.ssm.ssm_update": _ssm_update_without_kernel,
    "mlx_lm.models.rwkv7.Rwkv7TimeMixing._wkv7": lambda _: wkv7,
    "mlx_lm.models.kimi_k3._attn_res_mix": _attention_residual_without_kernel,
    "mlx_lm.models.deepseek_v41._sinkhorn": _sinkhorn_without_kernel,
}


@contextmanager
def differentiable_layers(model: nn.Module) -> Generator[None]:
    """Let the layers of this model call functions with a gradient, inside a `with` block."""
    modules = model.modules()
    classes = [type(module) for module in modules]
    for module, plain in zip(modules, classes, strict=True):
        module.__class__ = _differentiable_class(plain)
    try:
        yield
    finally:
        for module, plain in zip(modules, classes, strict=True):
            module.__class__ = plain


@cache
def _differentiable_class(layer: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass without GPU kernels, or the class itself if it calls none."""
    classes = layer.__mro__[: layer.__mro__.index(nn.Module)]
    attributes = {name: value for one in reversed(classes) for name, value in vars(one).items()}
    methods = {name: value for name, value in attributes.items() if _is_function(value)}
    changed = {name: _differentiable_method(method) for name, method in methods.items()}
    changed = {name: method for name, method in changed.items() if method is not methods[name]}
    if not changed:
        return layer
    names = {"__module__": layer.__module__, "__qualname__": layer.__qualname__}
    return type(layer.__name__, (layer,), names | changed)


def _differentiable_method(method: FunctionType) -> Callable[..., Any]:
    """Return the method without GPU kernels, or the method itself if it calls none."""
    if substitute := _substitute(method):
        return substitute
    called = {name: method.__globals__.get(name) for name in method.__code__.co_names}
    replaced = {name: new for name, value in called.items() if (new := _substitute(value))}
    if not replaced:
        return method
    names = method.__globals__ | replaced
    new = FunctionType(method.__code__, names, None, method.__defaults__, method.__closure__)
    new.__kwdefaults__ = method.__kwdefaults__
    return new


def _substitute(value: Any) -> Callable[..., Any] | None:
    if not _is_function(value):
        return None
    make = SUBSTITUTES.get(f"{value.__module__}.{value.__qualname__}")
    return make(value) if make else None


def _is_function(value: Any) -> bool:
    return isinstance(value, FunctionType)

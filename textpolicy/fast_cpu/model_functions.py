"""mlx-lm's models with faster functions of the same values, on a CPU.

Two functions that mlx-lm's models call spend much of their time in mlx's exponential for CPUs.
A layer that calls one of them becomes of a class with the same code, in whose eyes the name stands
for ours. Other models, and mlx-lm itself, stay as they are.
"""

from functools import cache
from types import FunctionType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import activations, base

from textpolicy.fast_cpu.attention import scaled_dot_product_attention
from textpolicy.fast_cpu.swiglu import swiglu

_FASTER = (
    (base.scaled_dot_product_attention, scaled_dot_product_attention),
    (activations.swiglu, swiglu),
)


def use_fast_functions(model: nn.Module) -> None:
    """On a CPU, let the layers of this model call the faster functions."""
    if mx.default_device().type != mx.cpu:
        return
    for module in model.modules():
        module.__class__ = _faster(type(module))


@cache
def _faster(kind: type[nn.Module]) -> type[nn.Module]:
    """The class with other functions under the names it calls; itself where it calls none."""
    call: Any = kind.__call__
    if not isinstance(call, FunctionType):
        return kind
    seen = {name: call.__globals__.get(name) for name in call.__code__.co_names}
    ours = {name: new for name, it in seen.items() for old, new in _FASTER if it is old}
    if not ours:
        return kind
    again = FunctionType(call.__code__, call.__globals__ | ours, None, None, call.__closure__)
    again.__defaults__, again.__kwdefaults__ = call.__defaults__, call.__kwdefaults__
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (kind,), names | {"__call__": again})

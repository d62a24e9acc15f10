"""Reading a module's weight in whatever format it is stored, and making a float module of it."""

import sys
from typing import Literal, Protocol, cast

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Float

from textpolicy.adapters.quantization.nf4 import NF4Embedding, NF4Linear, unpack_nf4
from textpolicy.adapters.quantization.number_formats import NumberFormat
from textpolicy.errors import ModelError

ModuleKind = Literal["linear", "embedding", "experts"]


class Packed(Protocol):
    """How mlx's quantized modules say what they hold."""

    bits: int
    group_size: int
    mode: str


_TILE = 2**20
"""Weights in float32 at once where a matrix is measured: 4 MB."""


def module_kind(module: nn.Module) -> ModuleKind | None:
    """How a module uses its weight, if it is one that can be adapted or quantized."""
    if isinstance(module, nn.Linear | nn.QuantizedLinear | NF4Linear):
        return "linear"
    if isinstance(module, nn.Embedding | nn.QuantizedEmbedding | NF4Embedding):
        return "embedding"
    return "experts" if isinstance(module, _expert_layers()) else None


def _expert_layers() -> tuple[type, ...]:
    # Importing mlx-lm takes seconds, and no model can hold its expert layers before it is imported.
    switch = sys.modules.get("mlx_lm.models.switch_layers")
    return (switch.SwitchLinear, switch.QuantizedSwitchLinear) if switch else ()


def format_of(module: nn.Module) -> NumberFormat | None:
    """How a module's weight is packed, or None if it is float."""
    if not is_quantized(module):
        return None
    packed = cast(Packed, module)
    return NumberFormat(bits=packed.bits, group_size=packed.group_size, mode=packed.mode)


def is_quantized(module: nn.Module) -> bool:
    """Whether the module's weight is packed; mlx-lm tells it by the same sign."""
    return "scales" in module


def weight_shape(module: nn.Module) -> tuple[int, ...]:
    """The shape of the weight as it is multiplied by, whatever the packing."""
    *rows, stored = module["weight"].shape
    if is_quantized(module):
        stored = stored * module["weight"].itemsize * 8 // cast(Packed, module).bits
    return (*rows, stored)


def float_weight(module: nn.Module) -> Float[mx.array, "*weight"]:
    """The weight that the forward pass multiplies by, in float32."""
    return _float_rows(module, slice(None))


def row_squares(module: nn.Module) -> Float[mx.array, " out"]:
    """The squared length of each row of `float_weight`, some megabytes of them at a time."""
    outputs, inputs = weight_shape(module)
    step = max(1, _TILE // inputs)
    squares: list[mx.array] = []
    for low in range(0, outputs, step):
        squares.append(mx.square(_float_rows(module, slice(low, low + step))).sum(axis=-1))
        # Left lazy, all the rows would be float at once.
        mx.eval(squares[-1])
    return mx.concatenate(squares)


def times_weight(
    module: nn.Module, factor: Float[mx.array, "in rank"]
) -> Float[mx.array, "out rank"]:
    """`float_weight` times a small float32 factor.

    mlx multiplies its own packed weights as they are. Others, unless they are float32, are float32
    for as long as the product takes.
    """
    if not isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
        return float_weight(module) @ factor
    product = mx.quantized_matmul(
        factor.T,
        module["weight"],
        module["scales"],
        module.get("biases"),
        group_size=module.group_size,
        bits=module.bits,
        mode=module.mode,
    )
    return product.T


def float_dtype(module: nn.Module) -> mx.Dtype:
    """The dtype that the base was in, or that it dequantizes to."""
    stored = module["scales"].dtype if is_quantized(module) else module["weight"].dtype
    return stored if mx.issubdtype(stored, mx.floating) else mx.bfloat16


def float_module(
    module: nn.Module, weight: Float[mx.array, "*weight"], bias: mx.array | None
) -> nn.Module:
    """The plain module of the same use with another weight."""
    # The constructors would draw weights from the global random state only to discard them.
    plain = _plain_class(module)
    made = plain.__new__(plain)
    nn.Module.__init__(made)
    made.weight = weight
    if bias is not None:
        made.bias = bias
    return made


def _plain_class(module: nn.Module) -> type[nn.Module]:
    match module_kind(module):
        case "linear":
            return nn.Linear
        case "embedding":
            return nn.Embedding
        case "experts":
            return sys.modules["mlx_lm.models.switch_layers"].SwitchLinear
        case None:
            raise ModelError(f"{type(module).__name__} has no weight that can be replaced")


def _float_rows(module: nn.Module, rows: slice) -> mx.array:
    weight = module["weight"][rows]
    if not is_quantized(module):
        return weight.astype(mx.float32)
    scales = module["scales"][rows]
    if isinstance(module, NF4Linear | NF4Embedding):
        return unpack_nf4(weight, scales)
    biases = module.get("biases")
    packed = cast(Packed, module)
    affine = packed.mode == "affine"
    whole = module.get("global_scale")
    unpacked = mx.dequantize(
        weight,
        # Asking mlx for float32 would still round to the dtype of scales and biases.
        scales.astype(mx.float32) if affine else scales,
        None if biases is None else biases[rows].astype(mx.float32),
        group_size=packed.group_size,
        bits=packed.bits,
        mode=packed.mode,
        dtype=mx.float32,
    )
    if whole is None:
        return unpacked
    # mlx-lm's nvfp4 experts have a scale each, in units of the largest e2m1 times the largest e4m3.
    return unpacked * (whole / (6 * 448))[:, None, None]

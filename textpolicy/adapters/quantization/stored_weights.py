"""Reading a module's weight, whatever its number format, and making float modules."""

import sys
from dataclasses import dataclass
from typing import Any, Literal, cast

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Float

from textpolicy.adapters.quantization.nf4 import NF4Embedding, NF4Linear, NF4Module, unpack_nf4
from textpolicy.adapters.quantization.number_formats import NumberFormat
from textpolicy.adapters.quantization.packed_product import (
    CPUQuantizedEmbedding,
    CPUQuantizedLinear,
    is_unpacked,
    packed_arrays,
    unpack_quantized,
)
from textpolicy.errors import ModelError
from textpolicy.fast_cpu.packed_weights import unpacked_weights

ModuleKind = Literal["linear", "embedding", "experts"]
"""How a module uses its weight."""
# At most this many weights are float32 at once while a matrix is measured: 4 MB.
_MEASURED_AT_ONCE = 2**20
_EXPERT_LAYERS = "mlx_lm.models.switch_layers"


def module_kind(module: nn.Module) -> ModuleKind | None:
    """Return how a module uses its weight, or None if it can be neither adapted nor quantized."""
    if isinstance(module, nn.Linear | nn.QuantizedLinear | NF4Linear):
        return "linear"
    if isinstance(module, nn.Embedding | nn.QuantizedEmbedding | NF4Embedding):
        return "embedding"
    # Importing mlx-lm takes seconds. A model with expert layers has imported this module already.
    if (switch := sys.modules.get(_EXPERT_LAYERS)) is None:
        return None
    classes = (switch.SwitchLinear, switch.QuantizedSwitchLinear)
    return "experts" if isinstance(module, classes) else None


def is_quantized(module: nn.Module) -> bool:
    """Return whether the module's weight is packed. mlx-lm decides by the same attribute."""
    return "scales" in module


def format_of(module: nn.Module) -> NumberFormat | None:
    """Return the number format of a module's weight, or None if the weight is float."""
    if not is_quantized(module):
        return None
    packed = cast(Any, module)
    return NumberFormat(bits=packed.bits, group_size=packed.group_size, mode=packed.mode)


def weight_shape(module: nn.Module) -> tuple[int, ...]:
    """Return the shape of the module's unpacked weight."""
    *rows, stored = module["weight"].shape
    if is_quantized(module):
        stored = stored * module["weight"].itemsize * 8 // module.bits
    return (*rows, stored)


def float_dtype(module: nn.Module) -> mx.Dtype:
    """Return the dtype of a float weight, or the dtype that a packed weight dequantizes to."""
    stored = module["scales"].dtype if is_quantized(module) else module["weight"].dtype
    return stored if mx.issubdtype(stored, mx.floating) else mx.bfloat16


def float_weight(module: nn.Module) -> Float[mx.array, "*weight"]:
    """Return the module's weight in float32."""
    return _float_rows(module, slice(None))


def row_squares(module: nn.Module) -> Float[mx.array, " out"]:
    """Return the squared norm of each row of `float_weight`, computed a few megabytes at a time."""
    outputs, inputs = weight_shape(module)
    step = max(1, _MEASURED_AT_ONCE // inputs)
    squares: list[mx.array] = []
    for low in range(0, outputs, step):
        squares.append(mx.square(_float_rows(module, slice(low, low + step))).sum(axis=-1))
        # Without evaluation here, all rows would be float32 at the same time.
        mx.eval(squares[-1])
    return mx.concatenate(squares)


def times_weight(
    module: nn.Module, factor: Float[mx.array, "in rank"]
) -> Float[mx.array, "out rank"]:
    """Return `float_weight` times a small float32 factor.

    mlx multiplies its own packed weights without unpacking them. Weights of other formats are
    float32 during the product.
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


@dataclass(frozen=True)
class UnpackedProduct:
    """The product of a quantized module, with its weight as floats."""

    weight: Float[mx.array, "out in"]
    bias: Float[mx.array, " out"] | None

    def __call__(self, x: Float[mx.array, "*batch in"]) -> Float[mx.array, "*batch out"]:
        """Return what the module returns."""
        y = (x.astype(self.weight.dtype) @ self.weight.T).astype(x.dtype)
        return y if self.bias is None else y + self.bias


def unpacked_product(module: Any, rows: int) -> UnpackedProduct | None:
    """Return the module's product with its weight unpacked.

    Where the module's own product of so many rows does not unpack the weight, this is None.
    """
    if not isinstance(module, NF4Module | CPUQuantizedLinear | CPUQuantizedEmbedding):
        return None
    inputs, groups = weight_shape(module)[-1], module["scales"].shape[-1]
    if not is_unpacked(module.mode, module.bits, inputs // groups, inputs, rows):
        return None
    unpacked = unpacked_weights(module.mode, module.bits, *packed_arrays(module))
    weight = float_weight(module) if unpacked is None else unpacked
    return UnpackedProduct(weight, module.get("bias"))


def make_float_module(
    module: nn.Module, weight: Float[mx.array, "*weight"], bias: mx.array | None
) -> nn.Module:
    """Return the float module of the same kind with another weight and bias."""
    # The constructor would draw weights from the global random state and then discard them.
    float_class = _float_class(module)
    made = float_class.__new__(float_class)
    nn.Module.__init__(made)
    made.weight = weight
    if bias is not None:
        made.bias = bias
    return made


def _float_class(module: nn.Module) -> type[nn.Module]:
    match module_kind(module):
        case "linear":
            return nn.Linear
        case "embedding":
            return nn.Embedding
        case "experts":
            return sys.modules[_EXPERT_LAYERS].SwitchLinear
        case None:
            raise ModelError(
                f"A {type(module).__name__} has no weight that can be replaced. Only linear, "
                "embedding and expert layers have one"
            )


def _float_rows(module: Any, rows: slice) -> mx.array:
    weight = module["weight"][rows]
    if not is_quantized(module):
        return weight.astype(mx.float32)
    scales = module["scales"][rows]
    if isinstance(module, NF4Module):
        return unpack_nf4(weight, scales)
    biases = module.get("biases")
    unpacked = unpack_quantized(
        weight,
        scales,
        None if biases is None else biases[rows],
        group_size=module.group_size,
        bits=module.bits,
        mode=module.mode,
    )
    global_scale = module.get("global_scale")
    if global_scale is None:
        return unpacked
    # mlx-lm's nvfp4 experts have one more scale each. Its unit is the largest e2m1 number, 6,
    # times the largest e4m3 number, 448.
    return unpacked * (global_scale / (6 * 448))[:, None, None]

"""Fewer bits for the base: quantization in place, and reading quantized modules."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Float

from textpolicy.adapters.tree import named_arrays
from textpolicy.errors import ConfigError, ModelError

_AFFINE_GROUPS = (32, 64, 128)
# Bits and group sizes that mlx offers in each mode.
_MODES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": ((2, 3, 4, 5, 6, 8), _AFFINE_GROUPS),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}
_REFUSED_BITS = {
    1: "its error is larger than that of all weights set to zero",
    7: "mlx has no kernels for it",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizationReport:
    """Paths that were quantized, paths that were not and why, and the measured bytes."""

    quantized: tuple[str, ...]
    left_out: Mapping[str, str]
    bytes_before: int
    bytes_after: int


def quantize(
    model: nn.Module, bits: int = 4, group_size: int = 64, mode: str = "affine"
) -> QuantizationReport:
    """Quantize every linear and embedding in place, and freeze them.

    Modules whose rows do not divide into groups stay as they are and are listed in the report.
    """
    _check_options(bits, group_size, mode)
    if any("lora_a" in module for module in model.modules()):
        raise ModelError(
            "the model has adapters; quantize its base before adapting it (create_qlora_setup "
            "does both), or unload the adapters first"
        )
    rows = {
        path: module.weight.shape[-1]
        for path, module in model.named_modules()
        if hasattr(module, "to_quantized")
    }
    left_out = {
        path: f"rows of {length} do not divide into groups of {group_size}"
        for path, length in rows.items()
        if length % group_size
    }
    chosen = sorted(rows.keys() - left_out)
    if not chosen:
        reason = left_out or "no module of the model can be quantized; is it quantized already?"
        raise ModelError(f"nothing to quantize with bits={bits}, mode={mode!r}: {reason}")
    before = _bytes(model)
    nn.quantize(model, group_size, bits, mode=mode, class_predicate=lambda path, _: path in chosen)
    modules = dict(model.named_modules())
    for path in chosen:
        # mlx attaches a bias after freezing the new module, which leaves it trainable.
        modules[path].freeze()
    mx.eval(model.parameters())
    return QuantizationReport(
        quantized=tuple(chosen), left_out=left_out, bytes_before=before, bytes_after=_bytes(model)
    )


def quantization_of(model: nn.Module) -> dict[str, Any] | None:
    """The arguments of `quantize` that describe this model, if it is quantized in one way."""
    ways = {
        (module.bits, module.group_size, module.mode)
        for module in model.modules()
        if is_quantized(module)
    }
    if len(ways) != 1:
        return None
    bits, group_size, mode = ways.pop()
    return {"bits": bits, "group_size": group_size, "mode": mode}


def is_quantized(module: nn.Module) -> bool:
    """Whether the module's weight is packed; mlx-lm tells it by the same sign."""
    return "scales" in module


def linear_dims(linear: nn.Linear | nn.QuantizedLinear) -> tuple[int, int]:
    """Input and output dimensions, whatever the packing."""
    outputs, inputs = linear.weight.shape
    if isinstance(linear, nn.QuantizedLinear):
        inputs = inputs * 32 // linear.bits
    return inputs, outputs


def float_weight(linear: nn.Linear | nn.QuantizedLinear) -> Float[mx.array, "out in"]:
    """The weight that the forward pass multiplies by, in float32."""
    if isinstance(linear, nn.Linear):
        return linear.weight.astype(mx.float32)
    # Asking mx.dequantize for float32 would still round to the dtype of scales and biases.
    biases = linear.get("biases")
    affine = linear.mode == "affine"
    return mx.dequantize(
        linear.weight,
        linear.scales.astype(mx.float32) if affine else linear.scales,
        None if biases is None else biases.astype(mx.float32),
        group_size=linear.group_size,
        bits=linear.bits,
        mode=linear.mode,
        dtype=mx.float32,
    )


def float_dtype(linear: nn.Linear | nn.QuantizedLinear) -> mx.Dtype:
    """The dtype that the base was in, or that it dequantizes to."""
    stored = linear.scales.dtype if isinstance(linear, nn.QuantizedLinear) else linear.weight.dtype
    return stored if mx.issubdtype(stored, mx.floating) else mx.bfloat16


def _check_options(bits: int, group_size: int, mode: str) -> None:
    if mode not in _MODES:
        raise ConfigError(f"quantization mode is {mode!r}; expected one of {list(_MODES)}")
    known_bits, known_groups = _MODES[mode]
    if bits not in known_bits:
        reason = f" ({_REFUSED_BITS[bits]})" if bits in _REFUSED_BITS else ""
        raise ConfigError(f"bits is {bits}{reason}; mode {mode!r} has {list(known_bits)}")
    if group_size not in known_groups:
        raise ConfigError(f"group_size is {group_size}; mode {mode!r} has {list(known_groups)}")


def _bytes(model: nn.Module) -> int:
    return sum(array.nbytes for array in named_arrays(model.parameters()).values())

"""Quantizing a model in place, and dequantizing it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from textpolicy.adapters.module_tree import named_arrays, replace_modules
from textpolicy.adapters.quantization.nf4 import NF4Embedding, NF4Linear
from textpolicy.adapters.quantization.number_formats import NumberFormat
from textpolicy.adapters.quantization.packed_product import use_fast_products
from textpolicy.adapters.quantization.stored_weights import (
    float_dtype,
    float_weight,
    format_of,
    is_quantized,
    make_float_module,
    module_kind,
)
from textpolicy.errors import ModelError

ModulePredicate = Callable[[str, nn.Module], bool]
"""A function of a module's path and the module."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizationReport:
    """The quantized paths, the reason for each path left out, and the measured bytes."""

    quantized: tuple[str, ...]
    left_out: Mapping[str, str]
    bytes_before: int
    bytes_after: int


def quantize(
    model: nn.Module,
    bits: int = 4,
    group_size: int | None = None,
    mode: str = "affine",
    *,
    predicate: ModulePredicate | None = None,
) -> QuantizationReport:
    """Quantize every linear, embedding and expert layer in place, and freeze these layers.

    `predicate` (path, module) selects layers. A layer whose rows do not divide into groups stays
    as it is and is listed in the report.
    """
    number_format = NumberFormat(bits=bits, group_size=group_size, mode=mode)
    _refuse_adapted(
        model, "Quantize the base before adapting it (create_qlora_setup does both), or unload"
    )
    problems = {
        path: quantization_problem(module, number_format)
        for path, module in model.named_modules()
        # mlx marks a module that it can quantize by this method.
        if hasattr(module, "to_quantized") and (predicate is None or predicate(path, module))
    }
    left_out = {path: reason for path, reason in problems.items() if reason}
    chosen = sorted(problems.keys() - left_out)
    if not chosen:
        reason = left_out or "no layer of the model can be quantized. Is it quantized already?"
        raise ModelError(f"There is nothing to quantize with bits={bits}, mode={mode!r}: {reason}")
    before = _total_bytes(model)
    quantize_modules(model, dict.fromkeys(chosen, number_format))
    return QuantizationReport(
        quantized=tuple(chosen),
        left_out=left_out,
        bytes_before=before,
        bytes_after=_total_bytes(model),
    )


def dequantize(
    model: nn.Module, dtype: mx.Dtype | None = None, *, predicate: ModulePredicate | None = None
) -> tuple[str, ...]:
    """Make quantized layers float again, in place, and return their paths.

    The default dtype is the dtype that the model had before quantization. Rounding an affine
    weight to this dtype can lose its last bits. float32 keeps all of them.
    """
    _refuse_adapted(model, "Fuse or unload")
    chosen = {
        path: module
        for path, module in model.named_modules()
        if is_quantized(module)
        and module_kind(module)
        and (not predicate or predicate(path, module))
    }
    if not chosen:
        raise ModelError("There is nothing to dequantize: no selected layer is quantized")
    for path, module in chosen.items():
        weight = float_weight(module).astype(dtype or float_dtype(module))
        made = make_float_module(module, weight, module.get("bias"))
        made.freeze()
        # One layer at a time: each packed weight is freed before the next float weight is made.
        mx.eval(made.parameters())
        replace_modules(model, {path: made})
    return tuple(chosen)


def model_quantization(model: nn.Module) -> dict[str, Any] | None:
    """Return the arguments of `quantize` that describe the model, or None without one format."""
    formats = {found for module in model.modules() if (found := format_of(module))}
    return formats.pop().options() if len(formats) == 1 else None


def quantize_modules(model: nn.Module, formats: Mapping[str, NumberFormat]) -> None:
    """Quantize the module at each path in place to its format, and freeze these modules."""
    modules = dict(model.named_modules())
    for path, number_format in formats.items():
        packed = quantize_module(path, modules.pop(path), number_format)
        mx.eval(packed.parameters())
        replace_modules(model, {path: packed})
    use_fast_products(model)


def quantize_module(path: str, module: nn.Module, number_format: NumberFormat) -> nn.Module:
    """Return a frozen copy of a float module in another format. Error messages show `path`."""
    if reason := quantization_problem(module, number_format):
        raise ModelError(f"{path} cannot be quantized to {number_format.name}: {reason}")
    if number_format.mode != "nf4":
        packed = cast(nn.Module, cast(Any, module).to_quantized(**number_format.options()))
    elif isinstance(module, nn.Linear):
        packed = NF4Linear.from_linear(module, cast(int, number_format.group_size))
    else:
        packed = NF4Embedding(module["weight"], cast(int, number_format.group_size))
    # mlx freezes the new module before it attaches the bias, so the bias would stay trainable.
    packed.freeze()
    return packed


def quantization_problem(module: nn.Module, number_format: NumberFormat) -> str | None:
    """Return why a module cannot be quantized to a format, or None."""
    if is_quantized(module):
        return f"it is quantized already ({format_of(module)})"
    if number_format.mode == "nf4" and not isinstance(module, nn.Linear | nn.Embedding):
        return f"nf4 is for linear and embedding layers, this is {type(module).__name__}"
    return number_format.row_problem(module["weight"].shape[-1])


def _refuse_adapted(model: nn.Module, advice: str) -> None:
    if any("lora_a" in module for module in model.modules()):
        raise ModelError(f"The model has adapters. {advice} the adapters first")


def _total_bytes(model: nn.Module) -> int:
    return sum(array.nbytes for array in named_arrays(model.parameters()).values())

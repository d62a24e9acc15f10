"""Fewer bits for the base and back, in place; and reading weights whatever they are packed in."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from textpolicy.adapters.module_tree import named_arrays, replace_modules
from textpolicy.adapters.quantization.cpu_layers import use_fast_products
from textpolicy.adapters.quantization.nf4 import NF4Embedding, NF4Linear
from textpolicy.adapters.quantization.number_formats import NumberFormat
from textpolicy.adapters.quantization.stored_weights import (
    float_dtype,
    float_module,
    float_weight,
    format_of,
    is_quantized,
    module_kind,
)
from textpolicy.errors import ModelError

Predicate = Callable[[str, nn.Module], bool]


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizationReport:
    """Paths that were quantized, paths that were not and why, and the measured bytes."""

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
    predicate: Predicate | None = None,
) -> QuantizationReport:
    """Quantize every linear, embedding and expert layer in place, and freeze them.

    `predicate` (path, module) chooses among them. Modules whose rows do not divide into groups
    stay as they are and are listed in the report.
    """
    form = NumberFormat(bits=bits, group_size=group_size, mode=mode)
    _refuse_adapted(model, "quantize its base before adapting it (create_qlora_setup does both)")
    fitting, left_out = _choose(model, form, predicate)
    if not fitting:
        reason = left_out or "no module of the model can be quantized; is it quantized already?"
        raise ModelError(f"nothing to quantize with bits={bits}, mode={mode!r}: {reason}")
    before = _bytes(model)
    pack_modules(model, dict.fromkeys(fitting, form))
    return QuantizationReport(
        quantized=tuple(fitting), left_out=left_out, bytes_before=before, bytes_after=_bytes(model)
    )


def pack_module(path: str, module: nn.Module, form: NumberFormat) -> nn.Module:
    """A float module in another format, frozen; `path` is for messages."""
    if reason := why_unpackable(module, form):
        raise ModelError(f"{path} cannot be quantized to {form.name}: {reason}")
    packed = _packed(module, form)
    # mlx attaches a bias after freezing the new module, which leaves it trainable.
    packed.freeze()
    return packed


def dequantize(
    model: nn.Module, dtype: mx.Dtype | None = None, *, predicate: Predicate | None = None
) -> tuple[str, ...]:
    """Make packed modules float again, in place; returns their paths.

    Without `dtype` it is the one that the model was quantized from, in which the last bits of an
    affine weight may be rounded away; float32 keeps them all.
    """
    _refuse_adapted(model, "fuse or unload its adapters first")
    chosen = {
        path: module
        for path, module in model.named_modules()
        if is_quantized(module)
        and module_kind(module)
        and (not predicate or predicate(path, module))
    }
    if not chosen:
        raise ModelError("nothing to dequantize: no chosen module of the model is quantized")
    for path, module in chosen.items():
        weight = float_weight(module).astype(dtype or float_dtype(module))
        made = float_module(module, weight, module.get("bias"))
        made.freeze()
        # One module at a time: each packed weight is freed before the next float one is made.
        mx.eval(made.parameters())
        replace_modules(model, {path: made})
    return tuple(chosen)


def model_quantization(model: nn.Module) -> dict[str, Any] | None:
    """The arguments of `quantize` that describe this model, if it is quantized in one way."""
    ways = {form for module in model.modules() if (form := format_of(module))}
    return ways.pop().options() if len(ways) == 1 else None


def _choose(
    model: nn.Module, form: NumberFormat, predicate: Predicate | None
) -> tuple[list[str], dict[str, str]]:
    """Paths to quantize, and the reason for each path that cannot be."""
    chosen = {
        path: why_unpackable(module, form)
        for path, module in model.named_modules()
        # mlx's own sign of a module that it can quantize.
        if hasattr(module, "to_quantized") and (predicate is None or predicate(path, module))
    }
    left_out = {path: reason for path, reason in chosen.items() if reason}
    return sorted(chosen.keys() - left_out), left_out


def why_unpackable(module: nn.Module, form: NumberFormat) -> str | None:
    """Why a module cannot be packed so, or None."""
    if is_quantized(module):
        return f"it is quantized already ({format_of(module)})"
    if form.mode == "nf4" and not isinstance(module, nn.Linear | nn.Embedding):
        return f"nf4 is for linear and embedding layers, this is {type(module).__name__}"
    return form.misfit(module["weight"].shape[-1])


def pack_modules(model: nn.Module, forms: Mapping[str, NumberFormat]) -> None:
    modules = dict(model.named_modules())
    for path, form in forms.items():
        packed = pack_module(path, modules.pop(path), form)
        mx.eval(packed.parameters())
        replace_modules(model, {path: packed})
    use_fast_products(model)


def _packed(module: nn.Module, form: NumberFormat) -> nn.Module:
    if form.mode != "nf4":
        return cast(Any, module).to_quantized(**form.options())
    group_size = cast(int, form.group_size)
    if isinstance(module, nn.Linear):
        return NF4Linear.from_linear(module, group_size)
    return NF4Embedding(module["weight"], group_size)


def _refuse_adapted(model: nn.Module, instead: str) -> None:
    if any("lora_a" in module for module in model.modules()):
        raise ModelError(f"the model has adapters; {instead}, or unload the adapters first")


def _bytes(model: nn.Module) -> int:
    return sum(array.nbytes for array in named_arrays(model.parameters()).values())

"""Fewer bits for the base and back, in place; and reading weights whatever they are packed in."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Float

from textpolicy.adapters.config.adapter_config import AdapterConfig
from textpolicy.adapters.config.number_formats import NumberFormat
from textpolicy.adapters.module_sites import Target, assign_rules, site_kind
from textpolicy.adapters.module_tree import named_arrays, replace_modules
from textpolicy.adapters.quantization.cpu_layers import use_fast_products
from textpolicy.adapters.quantization.nf4 import NF4Embedding, NF4Linear, unpack
from textpolicy.errors import ModelError


class Packed(Protocol):
    """How mlx's quantized modules say what they hold."""

    bits: int
    group_size: int
    mode: str


Predicate = Callable[[str, nn.Module], bool]

_TILE = 2**20
"""Weights in float32 at once where a matrix is measured: 4 MB."""


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
    _pack_all(model, dict.fromkeys(fitting, form))
    return QuantizationReport(
        quantized=tuple(fitting), left_out=left_out, bytes_before=before, bytes_after=_bytes(model)
    )


def quantize_by_rules(model: nn.Module, config: AdapterConfig) -> tuple[str, ...]:
    """Quantize in place what a config's rules say, or nothing if any of it cannot be."""
    forms = forms_to_pack(assign_rules(model, config))
    _pack_all(model, forms)
    return tuple(forms)


def forms_to_pack(targets: Mapping[str, Target]) -> dict[str, NumberFormat]:
    """What rules ask to quantize, by path; a base that already is as asked is left alone."""
    asked = {path: form for path, t in targets.items() if (form := t.rule.number_format)}
    forms = {path: form for path, form in asked.items() if format_of(targets[path].module) != form}
    problems = [
        f"{path}: {reason}"
        for path, form in forms.items()
        if (reason := _misfit(targets[path].module, form))
    ]
    if problems:
        raise ModelError(
            "rules ask for a quantization that cannot be; change tile_size, or put a rule without "
            "weight_qtype first\n  " + "\n  ".join(problems)
        )
    return forms


def pack_module(path: str, module: nn.Module, form: NumberFormat) -> nn.Module:
    """A float module in another format, frozen; `path` is for messages."""
    if reason := _misfit(module, form):
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
        if is_quantized(module) and site_kind(module) and (not predicate or predicate(path, module))
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


def quantization_of(model: nn.Module) -> dict[str, Any] | None:
    """The arguments of `quantize` that describe this model, if it is quantized in one way."""
    ways = {form for module in model.modules() if (form := format_of(module))}
    return ways.pop().options() if len(ways) == 1 else None


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
    match site_kind(module):
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
        return unpack(weight, scales)
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


def _choose(
    model: nn.Module, form: NumberFormat, predicate: Predicate | None
) -> tuple[list[str], dict[str, str]]:
    """Paths to quantize, and the reason for each path that cannot be."""
    chosen = {
        path: _misfit(module, form)
        for path, module in model.named_modules()
        # mlx's own sign of a module that it can quantize.
        if hasattr(module, "to_quantized") and (predicate is None or predicate(path, module))
    }
    left_out = {path: reason for path, reason in chosen.items() if reason}
    return sorted(chosen.keys() - left_out), left_out


def _misfit(module: nn.Module, form: NumberFormat) -> str | None:
    """Why a module cannot be packed so, or None."""
    if is_quantized(module):
        return f"it is quantized already ({format_of(module)})"
    if form.mode == "nf4" and not isinstance(module, nn.Linear | nn.Embedding):
        return f"nf4 is for linear and embedding layers, this is {type(module).__name__}"
    return form.misfit(module["weight"].shape[-1])


def _pack_all(model: nn.Module, forms: Mapping[str, NumberFormat]) -> None:
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

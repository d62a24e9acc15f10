"""The layers that an adapter config would adapt or quantize, and the bytes that they would take."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import cast

import mlx.core as mx
import mlx.nn as nn

from textpolicy.adapters.base_quantization import formats_to_apply
from textpolicy.adapters.config.adapter_config import (
    AdapterConfig,
    TargetModule,
    find_target_modules,
)
from textpolicy.adapters.config.model_layout import read_model_layout
from textpolicy.adapters.config.rules import AdapterKind
from textpolicy.adapters.layers.adapter_layer import tensor_shapes
from textpolicy.adapters.module_tree import named_arrays
from textpolicy.adapters.quantization.number_formats import NumberFormat
from textpolicy.adapters.quantization.stored_weights import float_dtype, format_of, weight_shape

_HEADINGS = ("module", "type", "shape", "adapter", "rank", "scale", "weights", "bytes", "+")


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedModule:
    """One linear, embedding or expert layer; `rank` and `scale` are None without an adapter.

    `bytes` are those of the layer as it will be stored; `adapter_bytes` come on top of them.
    """

    path: str
    module: str
    shape: tuple[int, ...]
    kind: AdapterKind
    rank: int | None
    scale: float | None
    quantization: str | None
    bytes: int
    adapter_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterPlan:
    """Every layer that can be adapted, and the bytes of all other arrays (`other_bytes`)."""

    modules: Sequence[PlannedModule]
    other_bytes: int

    @property
    def base_bytes(self) -> int:
        """The bytes of the frozen model."""
        return self.other_bytes + sum(row.bytes for row in self.modules)

    @property
    def adapter_bytes(self) -> int:
        """The bytes of the trained parameters."""
        return sum(row.adapter_bytes for row in self.modules)

    @property
    def trainable_parameters(self) -> int:
        """The number of trained parameters."""
        return self.adapter_bytes // mx.float32.size

    def __str__(self) -> str:
        """Return a table with a line for each layer, and the totals."""
        rows = [_HEADINGS, *map(_cells, self.modules)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        adapted = sum(row.kind != "none" for row in self.modules)
        lines.append(f"{adapted} of {len(self.modules)} layers adapted")
        size = f"{self.base_bytes:,} bytes frozen, {self.adapter_bytes:,} bytes trained"
        return "\n".join([*lines, f"{size} ({self.trainable_parameters:,} numbers)"])


def plan_adapters(model: nn.Module, config: AdapterConfig) -> AdapterPlan:
    """Return what `AdapterContainer.from_model` would make of the model, which does not change.

    Raise the errors that `from_model` would raise.
    """
    targets = find_target_modules(model, config)
    formats, modules = formats_to_apply(targets), dict(model.named_modules())
    paths = read_model_layout(model).adaptable
    rows = [_plan(path, modules[path], targets.get(path), formats.get(path)) for path in paths]
    inside = sum(_bytes(modules[path]) for path in paths)
    return AdapterPlan(modules=rows, other_bytes=_bytes(model) - inside)


def _plan(
    path: str, module: nn.Module, target: TargetModule | None, packed: NumberFormat | None
) -> PlannedModule:
    shape, stored, rule = weight_shape(module), _bytes(module), target.rule if target else None
    adapted = rule if rule and rule.kind != "none" else None
    tensors = tensor_shapes(adapted, target.kind, shape) if target and adapted else {}
    if packed:
        weight = cast(mx.array, module["weight"])
        stored += packed.stored_bytes(shape, float_dtype(module).size) - weight.nbytes
    form = packed or format_of(module)
    return PlannedModule(
        path=path,
        module=type(module).__name__,
        shape=shape,
        kind=rule.kind if rule else "none",
        rank=adapted.rank if adapted else None,
        scale=adapted.scale if adapted else None,
        quantization=f"{form.name} / {form.tile}" if form else None,
        bytes=stored,
        adapter_bytes=sum(map(prod, tensors.values())) * mx.float32.size,
    )


def _bytes(module: nn.Module) -> int:
    # A tied head is the same array under two names.
    arrays = {id(array): array.nbytes for array in named_arrays(module.parameters()).values()}
    return sum(arrays.values())


def _cells(row: PlannedModule) -> tuple[str, ...]:
    shape, kind = " x ".join(map(str, row.shape)), "-" if row.kind == "none" else row.kind
    rank, scale = (f"{value:g}" if value is not None else "-" for value in (row.rank, row.scale))
    weights, size = row.quantization or "float", f"{row.bytes:,}"
    return (row.path, row.module, shape, kind, rank, scale, weights, size, f"{row.adapter_bytes:,}")

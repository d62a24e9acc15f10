"""What a config will do to a model, before it does."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import cast

import mlx.core as mx
import mlx.nn as nn

from textpolicy.adapters.base_quantization import formats_to_apply
from textpolicy.adapters.config.adapter_config import AdapterConfig
from textpolicy.adapters.config.model_layout import read_model_layout
from textpolicy.adapters.config.rules import AdapterKind
from textpolicy.adapters.config.target_modules import TargetModule, find_target_modules
from textpolicy.adapters.layers.adapter_layer import tensor_shapes
from textpolicy.adapters.module_tree import named_arrays
from textpolicy.adapters.quantization.number_formats import NumberFormat
from textpolicy.adapters.quantization.stored_weights import float_dtype, format_of, weight_shape


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedModule:
    """One linear, embedding or expert layer; without an adapter, `rank` and `scale` are None.

    `bytes` are those of its own arrays as they will be stored, `adapter_bytes` those beside them.
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
    """Every layer that could be adapted, and the bytes of all else (`other_bytes`)."""

    modules: Sequence[PlannedModule]
    other_bytes: int

    @property
    def base_bytes(self) -> int:
        """Of the frozen model."""
        return self.other_bytes + sum(row.bytes for row in self.modules)

    @property
    def adapter_bytes(self) -> int:
        """Of what training moves."""
        return sum(row.adapter_bytes for row in self.modules)

    @property
    def trainable_parameters(self) -> int:
        """How many numbers training moves."""
        return self.adapter_bytes // mx.float32.size

    def __str__(self) -> str:
        """A table, a line a module, and the totals."""
        head = ("module", "type", "shape", "adapter", "rank", "scale", "weights", "bytes", "+")
        rows = [head, *(_cells(row) for row in self.modules)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return "\n".join([*lines, *self._totals()])

    def _totals(self) -> Iterator[str]:
        adapted = sum(row.kind != "none" for row in self.modules)
        yield f"{adapted} of {len(self.modules)} layers adapted"
        yield (
            f"{self.base_bytes:,} bytes frozen, {self.adapter_bytes:,} bytes trained "
            f"({self.trainable_parameters:,} numbers)"
        )


def plan_adapters(model: nn.Module, config: AdapterConfig) -> AdapterPlan:
    """What `AdapterContainer.from_model` would make of the model, which stays as it is.

    What cannot be is an error here as it is there.
    """
    targets = find_target_modules(model, config)
    forms = formats_to_apply(targets)
    modules = dict(model.named_modules())
    rows = [
        _planned(path, modules[path], targets.get(path), forms.get(path))
        for path in read_model_layout(model).sites
    ]
    arrays = {id(array): array.nbytes for array in named_arrays(model.parameters()).values()}
    inside = sum(_bytes(modules[row.path]) for row in rows)
    return AdapterPlan(modules=rows, other_bytes=sum(arrays.values()) - inside)


def _planned(
    path: str, module: nn.Module, target: TargetModule | None, form: NumberFormat | None
) -> PlannedModule:
    shape = weight_shape(module)
    adapted = target is not None and target.rule.kind != "none"
    shapes = tensor_shapes(target.rule, target.kind, shape) if target and adapted else {}
    stored = _bytes(module)
    if form:
        weight = cast(mx.array, module["weight"])
        stored += form.stored_bytes(shape, float_dtype(module).size) - weight.nbytes
    kept = form or format_of(module)
    return PlannedModule(
        path=path,
        module=type(module).__name__,
        shape=shape,
        kind=target.rule.kind if target else "none",
        rank=target.rule.rank if target and adapted else None,
        scale=target.rule.scale if target and adapted else None,
        quantization=f"{kept.name} / {kept.group_size}" if kept else None,
        bytes=stored,
        adapter_bytes=sum(prod(shape) for shape in shapes.values()) * mx.float32.size,
    )


def _bytes(module: nn.Module) -> int:
    return sum(array.nbytes for array in named_arrays(module.parameters()).values())


def _cells(row: PlannedModule) -> tuple[str, ...]:
    return (
        row.path,
        row.module,
        " x ".join(map(str, row.shape)),
        "-" if row.kind == "none" else row.kind,
        "-" if row.rank is None else str(row.rank),
        "-" if row.scale is None else f"{row.scale:g}",
        row.quantization or "float",
        f"{row.bytes:,}",
        f"{row.adapter_bytes:,}",
    )

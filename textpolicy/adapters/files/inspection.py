"""inspect_adapter: a summary of an adapter file or folder, made without the model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from textpolicy.adapters.adapter import group_by_module, is_finite
from textpolicy.adapters.files.layouts import read_adapter


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectedModule:
    """The adapter of one module."""

    path: str
    kind: str
    rank: int
    scale: float
    parameters: int


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterSummary:
    """`fingerprint` is None if the file, written by another library, does not name the base.

    `not_finite` names the tensors that contain NaN or infinity.
    """

    path: str
    version: int
    fingerprint: str | None
    quantization: Mapping[str, Any] | None
    config: Mapping[str, Any]
    modules: Sequence[InspectedModule]
    bytes: int
    dtypes: Sequence[str]
    not_finite: Sequence[str]

    @property
    def parameters(self) -> int:
        """The number of parameters."""
        return sum(module.parameters for module in self.modules)

    def __str__(self) -> str:
        """Return a line for each fact, then a table of the modules."""
        base = self.fingerprint[:12] if self.fingerprint else "unknown"
        lines = [
            f"{self.path}: version {self.version}, base {base}, "
            f"base quantization {self.quantization or 'none'}",
            f"{len(self.modules)} modules, {self.parameters:,} parameters, {self.bytes:,} bytes of "
            f"{', '.join(self.dtypes)}",
            *(f"not finite: {name}" for name in self.not_finite),
        ]
        width = max(len(module.path) for module in self.modules)
        lines += [
            f"  {module.path:{width}}  {module.kind}  rank {module.rank:<4} "
            f"scale {module.scale:<8g} {module.parameters:,}"
            for module in self.modules
        ]
        return "\n".join(lines)


def inspect_adapter(path: str | Path) -> AdapterSummary:
    """Return a summary of any adapter file or folder that can be loaded."""
    adapter = read_adapter(path)
    rules = adapter.rules_by_module()
    modules = [
        InspectedModule(
            path=path,
            kind="dora" if "m" in tensors else "lora",
            rank=rules[path].rank,
            scale=rules[path].scale,
            parameters=sum(array.size for array in tensors.values()),
        )
        for path, tensors in group_by_module(adapter.arrays).items()
    ]
    arrays = adapter.arrays
    return AdapterSummary(
        path=adapter.origin,
        version=adapter.version,
        fingerprint=adapter.fingerprint,
        quantization=adapter.quantization,
        config=adapter.config.to_dict(),
        modules=sorted(modules, key=lambda module: module.path),
        bytes=sum(array.nbytes for array in arrays.values()),
        dtypes=sorted({str(array.dtype).removeprefix("mlx.core.") for array in arrays.values()}),
        not_finite=sorted(name for name, array in arrays.items() if not is_finite(array)),
    )

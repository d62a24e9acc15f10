"""Adapter: one adapter apart from any model, and functions on its named tensors."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from textpolicy.adapters.config.adapter_config import AdapterConfig
from textpolicy.adapters.config.rules import LoRARule
from textpolicy.errors import AdapterError


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """Tensors by their names in the model, and the config that says which modules they adapt.

    `origin`, a path or a name, appears in error messages. `fingerprint` identifies the base
    model, and is None if another library wrote the adapter file and the file does not name its
    base. `quantization` holds the arguments of `quantize` that made the base, or None for a float
    base. `embedding_lookup_only` is True if embeddings are adapted for looking tokens up but not
    as an output head; such an adapter does not fit a model whose output head is the embedding
    table. `rows_in_pairs` is True if the rows of queries and keys are in llama.cpp's order, which
    only the numbers of heads of the model can undo; `AdapterContainer` undoes it.
    """

    origin: str
    arrays: Mapping[str, mx.array]
    config: AdapterConfig
    version: int = 0
    fingerprint: str | None = None
    quantization: Mapping[str, Any] | None = None
    embedding_lookup_only: bool = False
    rows_in_pairs: bool = False

    def rules_by_module(self) -> dict[str, LoRARule]:
        """Return the rule of each module that has tensors, with the rank of these tensors."""
        rule_for = self.config.selection.rule_for
        return {
            path: replace(rule_for(path), rank=rank_of(tensors) or 1)
            for path, tensors in group_by_module(self.arrays).items()
        }


def group_by_module(arrays: Mapping[str, mx.array]) -> dict[str, dict[str, mx.array]]:
    """Return the tensors of each module by the module's path."""
    modules: dict[str, dict[str, mx.array]] = {}
    for name, array in arrays.items():
        path, _, tensor = name.rpartition(".")
        modules.setdefault(path, {})[tensor] = array
    return modules


def join_module_tensors(modules: Mapping[str, Mapping[str, mx.array]]) -> dict[str, mx.array]:
    """Return the tensors of all modules by their whole names, the inverse of `group_by_module`."""
    return {
        f"{path}.{name}": array
        for path, tensors in modules.items()
        for name, array in tensors.items()
    }


def rank_of(tensors: Mapping[str, mx.array]) -> int | None:
    """Return the rank of a module's low-rank product, or None without one.

    Factors of experts have three axes, in the order of mlx-lm.
    """
    if "lora_a" not in tensors or (a := tensors["lora_a"]).ndim not in (2, 3) or not a.size:
        return None
    return a.shape[1] if a.ndim == 3 else a.shape[-1]


def digest_of(arrays: Mapping[str, mx.array]) -> str:
    """Return a hash of the names, shapes and bytes of arrays."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(bytes_of(array))
    return digest.hexdigest()


def bytes_of(array: mx.array) -> memoryview:
    """Return the bytes of an array."""
    # numpy has no bfloat16. For the other dtypes no mlx operation is needed, which takes longer.
    known = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    return np.ascontiguousarray(np.asarray(known)).reshape(-1).view(np.uint8).data


def is_finite(array: mx.array) -> bool:
    """Return whether all values are finite."""
    # For hundreds of small arrays, numpy is ten times as fast as scheduling mlx operations.
    return bool(np.isfinite(np.array(array.astype(mx.float32), copy=False)).all())


def check_float32(arrays: Mapping[str, mx.array]) -> None:
    """Raise AdapterError if a tensor is not float32."""
    for name, array in arrays.items():
        if array.dtype != mx.float32:
            raise AdapterError(
                f"{name} is {array.dtype}; expected float32, because small updates vanish in fewer "
                "bits. If the model was cast (set_dtype) after it was adapted, cast it before"
            )

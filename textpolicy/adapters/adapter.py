"""One adapter apart from any model: what files hold, and what waits to be put on a model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from textpolicy.adapters.config.adapter_config import AdapterConfig
from textpolicy.errors import AdapterError


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """Tensors by their names in the model, and the config that says where and how they act.

    `origin` is for messages: the path that it was read from, or its name. `fingerprint` is None
    where a file of another library does not say which base it is for. `quantization` holds the
    arguments of `quantize` that made the base, or None for a float base. With `lookup_only`,
    embeddings are adapted where tokens are looked up and nowhere else, so that it does not fit a
    model whose output head is that same table.
    """

    origin: str
    arrays: Mapping[str, mx.array]
    config: AdapterConfig
    version: int = 0
    fingerprint: str | None = None
    quantization: Mapping[str, Any] | None = None
    lookup_only: bool = False


def split_tensor_name(name: str) -> tuple[str, str]:
    """The module's path and the tensor's own name in a tensor's whole name."""
    path, _, tensor = name.rpartition(".")
    return path, tensor


def group_by_module(arrays: Mapping[str, mx.array]) -> dict[str, dict[str, mx.array]]:
    """The tensors of each module by path."""
    modules: dict[str, dict[str, mx.array]] = {}
    for name, array in arrays.items():
        path, tensor = split_tensor_name(name)
        modules.setdefault(path, {})[tensor] = array
    return modules


def join_module_tensors(modules: Mapping[str, Mapping[str, mx.array]]) -> dict[str, mx.array]:
    """The reverse of `by_module`."""
    return {
        f"{path}.{name}": array
        for path, tensors in modules.items()
        for name, array in tensors.items()
    }


def rank_of(tensors: Mapping[str, mx.array]) -> int | None:
    """The inner size of a module's product, or None if its tensors have none.

    The axes of experts' factors, which have three, are those of mlx-lm.
    """
    if "lora_a" not in tensors or (a := tensors["lora_a"]).ndim not in (2, 3) or not a.size:
        return None
    return a.shape[1] if a.ndim == 3 else a.shape[-1]


def check_float32(arrays: Mapping[str, mx.array]) -> None:
    """Refuse tensors that were cast to fewer bits."""
    for name, array in arrays.items():
        if array.dtype != mx.float32:
            raise AdapterError(
                f"{name} is {array.dtype}; expected float32, since small updates vanish in fewer "
                "bits. Was the model cast (set_dtype) after adapting it? Cast it before"
            )

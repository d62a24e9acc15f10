"""What a model is without its adapters, and a short name for it that adapter files carry."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from textpolicy.adapters.adapter import Adapter
from textpolicy.adapters.layers.adapter_layer import adapter_layers, base_parameters, base_path
from textpolicy.adapters.module_tree import frozen_names
from textpolicy.adapters.quantization.quantize import model_quantization
from textpolicy.adapters.quantization.stored_weights import is_quantized

_SAMPLES = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseIdentity:
    """What to tell of a model, and to restore, once it is adapted."""

    fingerprint: str
    quantization: Mapping[str, Any] | None
    frozen: Mapping[str, set[str]]

    @classmethod
    def of(cls, model: nn.Module) -> "BaseIdentity":
        """To be called before the model is adapted."""
        return cls(
            fingerprint=base_fingerprint(model),
            quantization=model_quantization(model),
            frozen=frozen_names(model),
        )

    def differences(self, adapter: Adapter) -> list[str]:
        """How the base that an adapter was made for differs from this one, where it says so."""
        if adapter.fingerprint is None:
            return []
        pairs = {
            "base quantization": (adapter.quantization, self.quantization),
            "base fingerprint": (adapter.fingerprint[:12], self.fingerprint[:12]),
        }
        return [
            f"{name}: {given} in the file, {own} in the model"
            for name, (given, own) in pairs.items()
            if given != own
        ]


def base_fingerprint(model: nn.Module) -> str:
    """A hash of the base: names, shapes, quantization, all vectors and a sample of each matrix.

    Values count in bfloat16, so that loading the same checkpoint in bfloat16 or float32 gives the
    same name. Packed weights count by their shape and quantization only.
    """
    parameters = dict(sorted(base_parameters(model).items()))
    packed = _packed(model)
    shapes = {name: array.shape for name, array in parameters.items()}
    values = [
        _sample(array).astype(mx.bfloat16)
        for name, array in parameters.items()
        if name.rpartition(".")[0] not in packed
    ]
    digest = hashlib.sha256(json.dumps([shapes, packed], sort_keys=True).encode())
    if values:
        digest.update(np.array(mx.concatenate(values).view(mx.uint16)).tobytes())
    return digest.hexdigest()


def _packed(model: nn.Module) -> dict[str, list[int | str]]:
    layers = adapter_layers(model)
    return {
        base_path(path, layers): [module.bits, module.group_size, module.mode]
        for path, module in model.named_modules()
        if is_quantized(module)
    }


def _sample(array: mx.array) -> mx.array:
    """A vector whole; of anything larger, values spread over all of it."""
    flat = array.reshape(-1)
    return flat if array.ndim < 2 else flat[:: max(1, array.size // _SAMPLES)][:_SAMPLES]

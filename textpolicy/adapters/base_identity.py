"""BaseIdentity: a fingerprint and the quantization of a base model, which adapter files carry."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from textpolicy.adapters.adapter import Adapter
from textpolicy.adapters.layers.adapter_layer import base_modules, base_parameters
from textpolicy.adapters.quantization.quantize import model_quantization
from textpolicy.adapters.quantization.stored_weights import is_quantized

_SAMPLES = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseIdentity:
    """Which base model an adapter belongs to."""

    fingerprint: str
    quantization: Mapping[str, Any] | None

    @classmethod
    def of(cls, model: nn.Module) -> "BaseIdentity":
        """Return the identity of a model without its adapters."""
        return cls(fingerprint=base_fingerprint(model), quantization=model_quantization(model))

    def differences(self, adapter: Adapter) -> list[str]:
        """Return how this base differs from the base that an adapter names, if it names one."""
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
    """Return a hash of the base: names, shapes, quantization, vectors and a sample of each matrix.

    Values are hashed in bfloat16, so that a checkpoint loaded in bfloat16 or float32 has the same
    fingerprint. Of packed weights only shape and quantization are hashed.
    """
    parameters = dict(sorted(base_parameters(model).items()))
    packed = {
        path: [module.bits, module.group_size, module.mode]
        for path, module in base_modules(model).items()
        if is_quantized(module)
    }
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


def _sample(array: mx.array) -> mx.array:
    """Return a whole vector, or values spread evenly over a larger array."""
    flat = array.reshape(-1)
    return flat if array.ndim < 2 else flat[:: max(1, array.size // _SAMPLES)][:_SAMPLES]

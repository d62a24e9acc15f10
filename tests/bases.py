"""One small model in every number format, and adapters that change its outputs."""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from tests.tiny import qwen3_model
from textpolicy.adapters import AdapterContainer, quantize


def packed(bits: int, mode: str = "affine", *, tied: bool = False) -> Callable[[], nn.Module]:
    """Return a function that makes the model with weights quantized to `bits` bits."""

    def make() -> nn.Module:
        model = qwen3_model(tie_word_embeddings=tied)
        quantize(model, bits, mode=mode)
        return model

    return make


def in_bfloat16() -> nn.Module:
    model = qwen3_model()
    model.set_dtype(mx.bfloat16)
    return model


BASES = {
    "float32": qwen3_model,
    "bfloat16": in_bfloat16,
    "4-bit": packed(4),
    "3-bit": packed(3),
    "nvfp4": packed(4, "nvfp4"),
    "nf4": packed(4, "nf4"),
}


def arrays(model: nn.Module) -> dict[str, mx.array]:
    return tree_flatten(model.parameters(), destination={})


def bits(logits: mx.array) -> mx.array:
    return logits.view(mx.uint16 if logits.dtype == mx.bfloat16 else mx.uint32)


def trained(container: AdapterContainer, seed: int = 1, size: float = 0.1) -> dict[str, mx.array]:
    """Return the adapter tensors with noise added, so that they change the model's outputs."""
    keys = mx.random.split(mx.random.key(seed), len(container.parameters()))
    return {
        name: array + mx.random.normal(array.shape, key=key) * size
        for (name, array), key in zip(container.parameters().items(), keys, strict=True)
    }

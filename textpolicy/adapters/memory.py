"""What a model takes: bytes of its arrays, parameters in and out of training."""

import mlx.core as mx
import mlx.nn as nn

from textpolicy.adapters.layers import adapter_layers, base_parameters, base_path
from textpolicy.adapters.quantization import is_quantized
from textpolicy.adapters.tree import named_arrays


def memory_stats(model: nn.Module) -> dict[str, int | float]:
    """Measured sizes of the model's arrays.

    base_bytes, adapter_bytes: sums over arrays, each array once
    base_parameters: weights the base stands for; packed ones are counted unpacked
    trainable_parameters, total_parameters: what the optimizer moves, and base plus adapters
    memory_ratio: adapter_bytes / base_bytes
    bits_per_weight: bits that the base stores for each of its parameters
    memory_savings_percent: the share of parameters that needs neither gradient nor optimizer state
    """
    base = base_parameters(model)
    adapters = {
        f"{path}.{name}": layer[name]
        for path, layer in adapter_layers(model).items()
        for name in layer.trainable
    }
    base_bytes, adapter_bytes = _bytes(base), _bytes(adapters)
    base_count = _logical_count(model, base)
    total = base_count + sum(array.size for array in adapters.values())
    trainable = sum(array.size for array in named_arrays(model.trainable_parameters()).values())
    return {
        "base_bytes": base_bytes,
        "adapter_bytes": adapter_bytes,
        "base_parameters": base_count,
        "trainable_parameters": trainable,
        "total_parameters": total,
        "memory_ratio": adapter_bytes / base_bytes,
        "bits_per_weight": 8 * base_bytes / base_count,
        "memory_savings_percent": 100 * (1 - trainable / total),
    }


def _bytes(arrays: dict[str, mx.array]) -> int:
    return sum(array.nbytes for array in {id(array): array for array in arrays.values()}.values())


def _logical_count(model: nn.Module, base: dict[str, mx.array]) -> int:
    layers = adapter_layers(model)
    bits = {
        base_path(path, layers): module.bits
        for path, module in model.named_modules()
        if is_quantized(module)
    }
    count = 0
    for name, array in base.items():
        module, _, leaf = name.rpartition(".")
        if module not in bits or leaf == "bias":
            count += array.size
        elif leaf == "weight":
            count += array.nbytes * 8 // bits[module]
    return count

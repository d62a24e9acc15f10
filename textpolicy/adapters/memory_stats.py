"""Measured memory of a model and its adapters: bytes of arrays and numbers of parameters."""

from collections.abc import Callable, Iterable

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from textpolicy.adapters.layers.adapter_layer import adapter_layers, base_modules, base_parameters
from textpolicy.adapters.module_tree import named_arrays
from textpolicy.adapters.quantization.stored_weights import is_quantized


def memory_stats(
    model: nn.Module, optimizer: optim.Optimizer | None = None
) -> dict[str, int | float]:
    """Return sizes measured on existing arrays, each array counted once.

    base_bytes, adapter_bytes: frozen weights, and trained adapter tensors
    adapter_buffer_bytes: other arrays of adapter layers (scale, gate, DoRA's row norms)
    gradient_bytes: one gradient of all trainable parameters
    optimizer_bytes: the optimizer's state; Adam has state from its first update on
    base_parameters: parameters of the base, with packed weights counted unpacked
    trainable_parameters, total_parameters: trained parameters, and base plus adapter parameters
    memory_ratio: adapter_bytes / base_bytes
    bits_per_weight: bits that the base stores for each of its parameters
    memory_savings_percent: the share of parameters without gradient and optimizer state
    """
    base, layers = base_parameters(model), adapter_layers(model)
    adapters = [layer[name] for layer in layers.values() for name in layer.trainable]
    buffers = [
        value
        for layer in layers.values()
        for name, value in layer.items()
        if name.startswith("_") and isinstance(value, mx.array)
    ]
    trained = named_arrays(model.trainable_parameters()).values()
    base_bytes, adapter_bytes = _unique_bytes(base.values()), _unique_bytes(adapters)
    base_count = _unpacked_count(model, base)
    total = base_count + sum(array.size for array in adapters)
    trainable = sum(array.size for array in trained)
    state = named_arrays(optimizer.state).values() if optimizer else ()
    return {
        "base_bytes": base_bytes,
        "adapter_bytes": adapter_bytes,
        "adapter_buffer_bytes": _unique_bytes(buffers),
        "gradient_bytes": sum(array.nbytes for array in trained),
        "optimizer_bytes": _unique_bytes(state),
        "base_parameters": base_count,
        "trainable_parameters": trainable,
        "total_parameters": total,
        "memory_ratio": adapter_bytes / base_bytes,
        "bits_per_weight": 8 * base_bytes / base_count,
        "memory_savings_percent": 100 * (1 - trainable / total),
    }


def print_trainable_parameters(model: nn.Module, write: Callable[[str], object] = print) -> None:
    """Write one line with the trainable parameters, all parameters, and the percentage.

    Packed weights are counted unpacked.
    """
    stats = memory_stats(model)
    trainable, total = int(stats["trainable_parameters"]), int(stats["total_parameters"])
    write(
        f"trainable params: {trainable:,} || all params: {total:,} || "
        f"trainable%: {100 * trainable / total:.4f}"
    )


def _unique_bytes(arrays: Iterable[mx.array]) -> int:
    return sum(array.nbytes for array in {id(array): array for array in arrays}.values())


def _unpacked_count(model: nn.Module, base: dict[str, mx.array]) -> int:
    bits = {path: m.bits for path, m in base_modules(model).items() if is_quantized(m)}
    count = 0
    for name, array in base.items():
        module, _, leaf = name.rpartition(".")
        if module not in bits or leaf == "bias":
            count += array.size
        elif leaf == "weight":
            count += array.nbytes * 8 // bits[module]
    return count

"""What a model takes: bytes of its arrays, parameters in and out of training."""

from collections.abc import Callable, Mapping

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from textpolicy.adapters.layers.adapter_layer import adapter_layers, base_parameters, base_path
from textpolicy.adapters.module_tree import named_arrays
from textpolicy.adapters.quantization.stored_weights import is_quantized


def memory_stats(
    model: nn.Module, optimizer: optim.Optimizer | None = None
) -> dict[str, int | float]:
    """Measured sizes of arrays that are there, each array once; gradients are as large as training
    makes them.

    base_bytes, adapter_bytes, adapter_buffer_bytes: frozen weights, trained tensors, and what
    layers keep beside them (scale, gate, DoRA's measured lengths)
    gradient_bytes: of one gradient of everything trainable
    optimizer_bytes: of the optimizer's state, which Adam has from its first update on
    base_parameters: weights the base stands for; packed ones are counted unpacked
    trainable_parameters, total_parameters: what the optimizer moves, and base plus adapters
    memory_ratio: adapter_bytes / base_bytes
    bits_per_weight: bits that the base stores for each of its parameters
    memory_savings_percent: the share of parameters that needs neither gradient nor optimizer state
    """
    base, layers = base_parameters(model), adapter_layers(model)
    adapters = {
        f"{path}.{name}": layer[name] for path, layer in layers.items() for name in layer.trainable
    }
    trained = named_arrays(model.trainable_parameters())
    base_bytes, adapter_bytes = _bytes(base), _bytes(adapters)
    base_count = _logical_count(model, base)
    total = base_count + sum(array.size for array in adapters.values())
    trainable = sum(array.size for array in trained.values())
    return {
        "base_bytes": base_bytes,
        "adapter_bytes": adapter_bytes,
        "adapter_buffer_bytes": _bytes(_buffers(model)),
        "gradient_bytes": sum(array.nbytes for array in trained.values()),
        "optimizer_bytes": _bytes(named_arrays(optimizer.state)) if optimizer else 0,
        "base_parameters": base_count,
        "trainable_parameters": trainable,
        "total_parameters": total,
        "memory_ratio": adapter_bytes / base_bytes,
        "bits_per_weight": 8 * base_bytes / base_count,
        "memory_savings_percent": 100 * (1 - trainable / total),
    }


def print_trainable_parameters(model: nn.Module, write: Callable[[str], object] = print) -> None:
    """Write one line: how many parameters are trained, of how many, and the percentage.

    Packed weights count as the weights that they stand for.
    """
    stats = memory_stats(model)
    trainable, total = int(stats["trainable_parameters"]), int(stats["total_parameters"])
    write(
        f"trainable params: {trainable:,} || all params: {total:,} || "
        f"trainable%: {100 * trainable / total:.4f}"
    )


def _buffers(model: nn.Module) -> dict[str, mx.array]:
    return {
        f"{path}.{name}": value
        for path, layer in adapter_layers(model).items()
        for name, value in layer.items()
        if name.startswith("_") and isinstance(value, mx.array)
    }


def _bytes(arrays: Mapping[str, mx.array]) -> int:
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

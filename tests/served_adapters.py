"""Adapters of the embedded model whose answers differ from the model's and from each other's."""

from pathlib import Path
from typing import Any

import mlx.core as mx


def write_adapter(
    path: Path, load_tiny: Any, seed: int, *, version: int = 1, rank: int = 4
) -> Path:
    """Write an adapter of the embedded model that changes its answers."""
    from textpolicy.adapters import AdapterConfig, AdapterContainer

    model, _ = load_tiny()
    container = AdapterContainer.from_model(model, AdapterConfig(rank=rank), seed=seed)
    keys = iter(mx.random.split(mx.random.key(seed), 100))
    container.swap(
        {
            name: mx.random.normal(array.shape, key=next(keys)) * (0.3 if "lora_b" in name else 0.1)
            for name, array in container.parameters().items()
        },
        version=version,
    )
    container.publish(path)
    return path


def write_adapters(folder: Path, load_tiny: Any) -> dict[str, Path]:
    """Write the adapters "red", of version 1, and "blue", of version 2."""
    return {
        name: write_adapter(folder / f"{name}.safetensors", load_tiny, seed, version=seed)
        for seed, name in enumerate(("red", "blue"), start=1)
    }

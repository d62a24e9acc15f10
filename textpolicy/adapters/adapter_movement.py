"""Metrics that show how far adapters have moved, and whether a run learns anything."""

import mlx.core as mx

from textpolicy.adapters.container import AdapterContainer


def adapter_movement(adapters: AdapterContainer) -> dict[str, float]:
    """Return the Frobenius norm of all updates to the base, and the share of B that is not zero."""
    squares: list[mx.array] = []
    moved: list[mx.array] = []
    for layer in adapters.layers().values():
        squares.append(layer.product_square())
        moved.append((layer.lora_b != 0).astype(mx.float32).mean())
    return {
        "adapters/delta_norm": float(mx.sqrt(mx.maximum(mx.stack(squares).sum(), 0))),
        "adapters/moved": float(mx.stack(moved).mean()),
    }

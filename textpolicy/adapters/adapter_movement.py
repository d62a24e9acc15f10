"""How far adapters have moved: the number that shows a run which learns nothing."""

import mlx.core as mx

from textpolicy.adapters.container import AdapterContainer


def adapter_movement(adapters: AdapterContainer) -> dict[str, float]:
    """The Frobenius norm of what all adapters add to the base, and the share of B that is not 0."""
    squares: list[mx.array] = []
    moved: list[mx.array] = []
    for layer in adapters.layers().values():
        squares.append(layer.product_square())
        moved.append((layer.lora_b != 0).astype(mx.float32).mean())
    return {
        "adapters/delta_norm": float(mx.sqrt(mx.maximum(mx.stack(squares).sum(), 0))),
        "adapters/moved": float(mx.stack(moved).mean()),
    }

"""Layers that add a trainable update to a frozen module, and leave that module as it is."""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Bool, Float

from textpolicy.adapters.quantization import linear_dims
from textpolicy.adapters.tree import named_arrays

if TYPE_CHECKING:
    from textpolicy.adapters.container import AdapterContainer


class LoRALinear(nn.Module):
    """y = base(x) + scale * (x A) B, with A and B in float32 over a base of any dtype.

    `scale` and the gate are arrays with an underscore in their names: a compiled function that
    takes the model's state sees them change, and no optimizer does.
    """

    trainable = ("lora_a", "lora_b")
    # Set by the container, so that a model leads to its container and to no other.
    container: "AdapterContainer | None" = None

    def __init__(
        self,
        linear: nn.Linear | nn.QuantizedLinear,
        *,
        rank: int,
        scale: float,
        dropout: float,
        key: mx.array,
    ) -> None:
        super().__init__()
        inputs, outputs = linear_dims(linear)
        bound = 1 / math.sqrt(inputs)
        self.linear = linear
        self.dropout = nn.Dropout(dropout)
        self.lora_a = mx.random.uniform(-bound, bound, (inputs, rank), key=key)
        self.lora_b = mx.zeros((rank, outputs))
        self._scale = mx.array(scale, mx.float32)
        self._enabled = mx.array(True)

    def __call__(self, x: Float[mx.array, "*batch in"]) -> Float[mx.array, "*batch out"]:
        y = self.linear(x)
        # Gate and scale meet the activations where they are narrowest: this is their whole cost.
        gain = mx.where(self._enabled, self._scale, 0.0)
        update = (gain * (self.dropout(x) @ self.lora_a)) @ self.lora_b
        return y + update.astype(y.dtype)

    def switch(self, on: Bool[mx.array, ""]) -> Bool[mx.array, ""]:
        """Set the gate; returns what it was. Off is the base exactly."""
        before = self._enabled
        self._enabled = on
        return before

    def delta(self) -> Float[mx.array, "out in"]:
        """What the adapters add to the base weight, in float32."""
        a, b = self.lora_a.astype(mx.float32), self.lora_b.astype(mx.float32)
        return self._scale * (a @ b).T


# A new kind of layer is a class above, a member here, and a line below for what it goes around.
AdapterLayer = LoRALinear
ADAPTED_BY: dict[type[nn.Module], Callable[..., AdapterLayer]] = {
    nn.Linear: LoRALinear,
    nn.QuantizedLinear: LoRALinear,
}


def new_layer(
    module: nn.Module, *, rank: int, scale: float, dropout: float, key: mx.array
) -> AdapterLayer:
    """The adapter layer around a module of one of these kinds, with an update of zero."""
    kind = next(layer for adapted, layer in ADAPTED_BY.items() if isinstance(module, adapted))
    return kind(module, rank=rank, scale=scale, dropout=dropout, key=key)


def adapter_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """The adapter layers in a model by path, first block first."""
    modules = reversed(model.named_modules())
    return {path: module for path, module in modules if isinstance(module, AdapterLayer)}


def base_path(path: str, layers: Mapping[str, AdapterLayer]) -> str:
    """The path that a module inside the adapted model has without adapters."""
    outer, _, name = path.rpartition(".")
    return outer if name == "linear" and outer in layers else path


def base_parameters(model: nn.Module) -> dict[str, mx.array]:
    """The parameters that are not adapters, under the names that they have without adapters."""
    layers = adapter_layers(model)
    named: dict[str, mx.array] = {}
    for name, array in named_arrays(model.parameters()).items():
        module, _, leaf = name.rpartition(".")
        if module not in layers:
            named[f"{base_path(module, layers)}.{leaf}"] = array
    return named

"""AdapterState: tells whether a model computes with the same adapters as before."""

from operator import is_

import mlx.core as mx
import mlx.nn as nn

from textpolicy.adapters.layers.adapter_layer import adapter_layers


class AdapterState:
    """The arrays of all adapter layers of a model, with their scales and gates, at one time.

    Two states are equal if these are the very same arrays. A version cannot tell: two adapters may
    have the same version, and an adapter that is turned off keeps its version.
    """

    def __init__(self, arrays: list[mx.array]) -> None:
        # Held, so that no later array can be at the address of one of these.
        self._arrays = arrays

    @classmethod
    def of(cls, model: nn.Module) -> "AdapterState":
        """Return the present state of the adapters in a model.

        Of a copy with merged weights, this is the state of the adapters that were merged.
        """
        merged = vars(model).get("merged_state")
        if isinstance(merged, AdapterState):
            return merged
        layers = adapter_layers(model).values()
        return cls([array for layer in layers for array in layer.state_arrays()])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, AdapterState) or len(self._arrays) != len(other._arrays):
            return False
        return all(map(is_, self._arrays, other._arrays))

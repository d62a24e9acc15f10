"""The adapter layer class for each kind of adapter and module."""

from collections.abc import Mapping

import mlx.core as mx

from textpolicy.adapters.config.target_modules import TargetModule
from textpolicy.adapters.layers.adapter_layer import AdapterLayer
from textpolicy.adapters.layers.dora import DoRAEmbedding, DoRALinear
from textpolicy.adapters.layers.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear

# To add a kind of layer, write its class and name the class here.
_CLASSES: dict[tuple[str, str], type[AdapterLayer]] = {
    (layer_class.kind, layer_class.module_kind): layer_class
    for layer_class in (LoRALinear, LoRAEmbedding, LoRASwitchLinear, DoRALinear, DoRAEmbedding)
}


def new_layers(targets: Mapping[str, TargetModule], seed: int = 0) -> dict[str, AdapterLayer]:
    """Return a new adapter layer around each target module, with weights drawn from `seed`.

    The model that holds the modules stays unchanged.
    """
    adapted = {path: target for path, target in targets.items() if target.rule.kind != "none"}
    keys = mx.random.split(mx.random.key(seed), len(adapted)) if adapted else ()
    return {
        path: _CLASSES[target.rule.kind, target.kind](target.module, target.rule, key)
        for (path, target), key in zip(adapted.items(), keys, strict=True)
    }

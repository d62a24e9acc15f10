"""Which class stands beside which module."""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from textpolicy.adapters.config.rules import LoRARule
from textpolicy.adapters.config.target_modules import TargetModule
from textpolicy.adapters.layers.adapter_layer import AdapterLayer
from textpolicy.adapters.layers.dora import DoRAEmbedding, DoRALinear
from textpolicy.adapters.layers.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear

# A new kind of layer is a class and a line here.
_KINDS: dict[tuple[str, str], Callable[[nn.Module, LoRARule, mx.array], AdapterLayer]] = {
    ("lora", "linear"): LoRALinear,
    ("lora", "embedding"): LoRAEmbedding,
    ("lora", "experts"): LoRASwitchLinear,
    ("dora", "linear"): DoRALinear,
    ("dora", "embedding"): DoRAEmbedding,
}


def new_layer(target: TargetModule, key: mx.array) -> AdapterLayer:
    """The adapter layer around a target's module, drawn from `key`."""
    return _KINDS[target.rule.kind, target.kind](target.module, target.rule, key)

"""Adapters: the only weights that are trained, published, swapped and shipped."""

from textpolicy.adapters.config import AdapterConfig
from textpolicy.adapters.container import AdapterContainer, attach_adapter
from textpolicy.adapters.files import AdapterFile, AdapterWatcher, peek_version, read_adapter
from textpolicy.adapters.fuse import FusedModule, FuseReport
from textpolicy.adapters.memory import memory_stats, print_trainable_parameters
from textpolicy.adapters.nf4 import NF4Embedding, NF4Linear
from textpolicy.adapters.plan import AdapterPlan, PlannedModule, plan
from textpolicy.adapters.quantization import QuantizationReport, dequantize, quantize
from textpolicy.adapters.rules import LoRARule
from textpolicy.adapters.twin import twin

__all__ = [
    "AdapterConfig",
    "AdapterContainer",
    "AdapterFile",
    "AdapterPlan",
    "AdapterWatcher",
    "FuseReport",
    "FusedModule",
    "LoRARule",
    "NF4Embedding",
    "NF4Linear",
    "PlannedModule",
    "QuantizationReport",
    "attach_adapter",
    "dequantize",
    "memory_stats",
    "peek_version",
    "plan",
    "print_trainable_parameters",
    "quantize",
    "read_adapter",
    "twin",
]

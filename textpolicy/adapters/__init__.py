"""Adapters: the only weights that are trained, published, swapped and shipped."""

from textpolicy.adapters.adapter import Adapter
from textpolicy.adapters.config import AdapterConfig
from textpolicy.adapters.container import AdapterContainer
from textpolicy.adapters.files import peek_version
from textpolicy.adapters.folders import read_adapter
from textpolicy.adapters.fuse import FusedModule, FuseReport
from textpolicy.adapters.inspection import AdapterSummary, inspect_adapter
from textpolicy.adapters.memory import memory_stats, print_trainable_parameters
from textpolicy.adapters.nf4 import NF4Embedding, NF4Linear
from textpolicy.adapters.plan import AdapterPlan, PlannedModule, plan
from textpolicy.adapters.publishing import AdapterPublisher, AdapterWatcher
from textpolicy.adapters.quantization import QuantizationReport, dequantize, quantize
from textpolicy.adapters.rules import LoRARule
from textpolicy.adapters.twin import twin

__all__ = [
    "Adapter",
    "AdapterConfig",
    "AdapterContainer",
    "AdapterPlan",
    "AdapterPublisher",
    "AdapterSummary",
    "AdapterWatcher",
    "FuseReport",
    "FusedModule",
    "LoRARule",
    "NF4Embedding",
    "NF4Linear",
    "PlannedModule",
    "QuantizationReport",
    "dequantize",
    "inspect_adapter",
    "memory_stats",
    "peek_version",
    "plan",
    "print_trainable_parameters",
    "quantize",
    "read_adapter",
    "twin",
]

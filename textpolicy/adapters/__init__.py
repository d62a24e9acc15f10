"""Adapters: the weights that training updates, publishes, swaps and exports."""

from textpolicy.adapters.adapter import Adapter
from textpolicy.adapters.combine import combine_adapters
from textpolicy.adapters.config.adapter_config import AdapterConfig
from textpolicy.adapters.config.rules import LoRARule
from textpolicy.adapters.container import AdapterContainer, adapted_copy, shared_copy
from textpolicy.adapters.files.adapter_file import peek_version
from textpolicy.adapters.files.inspection import AdapterSummary, inspect_adapter
from textpolicy.adapters.files.layouts import read_adapter
from textpolicy.adapters.fuse import FusedModule, FuseReport
from textpolicy.adapters.memory_stats import memory_stats, print_trainable_parameters
from textpolicy.adapters.publishing import AdapterPublisher, AdapterWatcher
from textpolicy.adapters.quantization.nf4 import NF4Embedding, NF4Linear
from textpolicy.adapters.quantization.quantize import QuantizationReport, dequantize, quantize

__all__ = [
    "Adapter",
    "AdapterConfig",
    "AdapterContainer",
    "AdapterPublisher",
    "AdapterSummary",
    "AdapterWatcher",
    "FuseReport",
    "FusedModule",
    "LoRARule",
    "NF4Embedding",
    "NF4Linear",
    "QuantizationReport",
    "adapted_copy",
    "combine_adapters",
    "dequantize",
    "inspect_adapter",
    "memory_stats",
    "peek_version",
    "print_trainable_parameters",
    "quantize",
    "read_adapter",
    "shared_copy",
]

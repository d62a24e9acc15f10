"""Adapters: the only weights that are trained, published, swapped and shipped."""

from textpolicy.adapters.config import AdapterConfig
from textpolicy.adapters.container import AdapterContainer, attach_adapter
from textpolicy.adapters.files import AdapterFile, AdapterWatcher, peek_version, read_adapter
from textpolicy.adapters.fuse import FusedModule, FuseReport
from textpolicy.adapters.memory import memory_stats
from textpolicy.adapters.quantization import QuantizationReport, quantize
from textpolicy.adapters.twin import twin

__all__ = [
    "AdapterConfig",
    "AdapterContainer",
    "AdapterFile",
    "AdapterWatcher",
    "FuseReport",
    "FusedModule",
    "QuantizationReport",
    "attach_adapter",
    "memory_stats",
    "peek_version",
    "quantize",
    "read_adapter",
    "twin",
]

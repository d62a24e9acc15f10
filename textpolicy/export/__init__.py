"""Exports: what was trained, as folders for other programs, each proved to be what was trained."""

from textpolicy.export.exporting import Exported, export_adapter
from textpolicy.export.proof import Proof

__all__ = ["Exported", "Proof", "export_adapter"]

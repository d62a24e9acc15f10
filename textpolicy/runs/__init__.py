"""The directory of a run: its files, and the lock that allows only one writer."""

from textpolicy.runs.directory import RunDirectory, new_directory
from textpolicy.runs.named_adapter import NamedAdapter, find_adapter, read_named_adapter

__all__ = [
    "NamedAdapter",
    "RunDirectory",
    "find_adapter",
    "new_directory",
    "read_named_adapter",
]

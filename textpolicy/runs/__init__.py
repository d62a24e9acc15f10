"""The directory of a run."""

from textpolicy.runs.directory import RunDirectory

__all__ = ["RunDirectory"]

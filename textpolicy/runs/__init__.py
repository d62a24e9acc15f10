"""The directory of a run."""

from textpolicy.runs.directory import RunDirectory, claim, new_directory

__all__ = ["RunDirectory", "claim", "new_directory"]

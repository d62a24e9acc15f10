"""The directory of a run: its files, and the lock that allows only one writer."""

from textpolicy.runs.directory import RunDirectory, new_directory

__all__ = ["RunDirectory", "new_directory"]

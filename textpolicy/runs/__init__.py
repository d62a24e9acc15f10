"""The directory of a run: its files, and the lock that allows only one writer."""

from textpolicy.runs.directory import RunDirectory, make_private_folder, new_directory

__all__ = ["RunDirectory", "make_private_folder", "new_directory"]

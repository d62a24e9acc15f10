"""One paper per file, known by the name of the file; what algorithms share is in `parts/`."""

from textpolicy.algorithms.parts.declaration import Declaration
from textpolicy.algorithms.parts.registry import Algorithm, get, names

__all__ = ["Algorithm", "Declaration", "get", "names"]

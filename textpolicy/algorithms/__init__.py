"""One paper per file: rewards to advantages, log-probabilities to a loss. `parts/` is shared."""

from textpolicy.algorithms.parts.declaration import Declaration
from textpolicy.algorithms.parts.registry import Algorithm, get, names

__all__ = ["Algorithm", "Declaration", "get", "names"]

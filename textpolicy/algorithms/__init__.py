"""One paper a file: rewards to advantages, log-probabilities to a loss. `get` finds one by name."""

from textpolicy.algorithms.registry import Algorithm, get, names, register

__all__ = ["Algorithm", "get", "names", "register"]

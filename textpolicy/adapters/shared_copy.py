"""A second model over the same arrays."""

import mlx.nn as nn

from textpolicy.adapters.container import AdapterContainer
from textpolicy.adapters.module_tree import share_tree


def shared_copy(model: nn.Module) -> nn.Module:
    """Another model sharing every array, with adapters of its own that begin equal.

    Training or swapping the one never touches the other. The copy publishes nowhere, and of
    several adapters it has the active one.
    """
    copy = share_tree(model)
    if container := AdapterContainer.of(model):
        container.share(copy)
    return copy

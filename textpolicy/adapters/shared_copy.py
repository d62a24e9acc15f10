"""shared_copy: a second model over the same arrays."""

import mlx.nn as nn

from textpolicy.adapters.container import AdapterContainer
from textpolicy.adapters.module_tree import share_module_tree


def shared_copy(model: nn.Module) -> nn.Module:
    """Return another model that shares every array, with its own copy of the active adapter.

    Training one model, or swapping its adapter, never changes the other. The copy has no
    `publish_path`, and none of the inactive adapters.
    """
    copy = share_module_tree(model)
    if container := AdapterContainer.of(model):
        container.copy_to(copy)
    return copy

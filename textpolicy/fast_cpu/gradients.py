"""Functions with a gradient of our own, which cost nothing more where no gradient is needed."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import mlx.core as mx

_NO_GRADIENTS = ContextVar("no gradients", default=False)


@contextmanager
def without_gradients() -> Generator[None]:
    """Say that no gradient of what this block computes is needed.

    mlx takes about 10 microseconds to call a function that has a gradient of its own. A decode step
    of a small model calls hundreds of them.
    """
    token = _NO_GRADIENTS.set(True)
    try:
        yield
    finally:
        _NO_GRADIENTS.reset(token)


def are_gradients_needed() -> bool:
    """Return whether this is outside every `without_gradients` block."""
    return not _NO_GRADIENTS.get()


def with_gradient(value: Callable[..., Any], gradient: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of arrays with this value, and this function as its vjp."""
    differentiable: Any = mx.custom_function(value)
    differentiable.vjp(gradient)

    def compute(*arrays: mx.array) -> Any:
        return value(*arrays) if _NO_GRADIENTS.get() else differentiable(*arrays)

    return compute

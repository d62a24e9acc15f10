"""Random arrays, and a comparison with exact numbers."""

import mlx.core as mx
import numpy as np
from numpy.typing import ArrayLike


def normal(*shape: int, seed: int = 0) -> mx.array:
    """Return normal numbers, which are the same for the same seed."""
    return mx.random.normal(shape, key=mx.random.key(seed))


def assert_close(
    found: ArrayLike | mx.array, right: np.ndarray, *, within: float = 1e-5, least: float = 1e-3
) -> None:
    """Compare each error with the largest of the right numbers and of `least`."""
    assert found.shape == right.shape
    size = max(least, np.abs(right).max())
    assert np.abs(np.array(found) - right).max() <= within * size

"""The types and shapes in signatures are enforced while tests run."""

import mlx.core as mx
import pytest
from jaxtyping import TypeCheckError

from textpolicy.generation.sampling import draw_tokens, random_keys
from textpolicy.types import Sampling
from textpolicy.untrusted.terminal import terminal_safe


def test_an_argument_of_another_type_is_an_error():
    with pytest.raises(TypeCheckError, match="text"):
        terminal_safe(3)  # pyright: ignore[reportArgumentType]


def test_arrays_whose_shapes_do_not_fit_each_other_are_an_error():
    keys = mx.array(random_keys(0, [(0, 0)]))
    draw_tokens(mx.zeros((1, 5)), keys, Sampling())
    with pytest.raises(TypeCheckError, match="rows"):
        draw_tokens(mx.zeros((2, 5)), keys, Sampling())


def test_an_array_of_another_dtype_is_an_error():
    keys = mx.array(random_keys(0, [(0, 0)]))
    with pytest.raises(TypeCheckError, match="keys"):
        draw_tokens(mx.zeros((1, 5)), keys.astype(mx.float32), Sampling())

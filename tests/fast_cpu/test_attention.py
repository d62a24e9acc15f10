"""Attention of a decode step: exact, the same for a row whatever is beside it, without a copy."""

import mlx.core as mx
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from tests.fast_cpu.arrays import normal
from textpolicy.fast_cpu import attention
from textpolicy.fast_cpu.attention import scaled_dot_product_attention
from textpolicy.fast_cpu.gradients import without_gradients

pytestmark = pytest.mark.usefixtures("compiled_operations")

COUNTED = attention

SCALE = 0.3


def step(queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array | None = None):
    """Return the attention of a decode step as numpy's array."""
    with without_gradients():
        return np.array(scaled_dot_product_attention(queries, keys, values, None, SCALE, mask))


def exact(queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array | None = None):
    """Return the same in float64 by numpy alone."""
    q, k, v = (np.array(x, np.float64) for x in (queries, keys, values))
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = SCALE * q @ k.swapaxes(-1, -2)
    if mask is not None:
        scores = np.where(np.array(mask), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ v


MASKS = {
    "one for all": lambda rows, seen: (seen,),
    "one for all positions": lambda rows, seen: (1, seen),
    "one for all heads": lambda rows, seen: (1, 1, seen),
    "one a row": lambda rows, seen: (rows, 1, 1, seen),
}


@pytest.mark.parametrize("masked", [None, *MASKS])
@pytest.mark.parametrize(
    ("rows", "heads", "key_heads", "seen", "width", "value_width"),
    [
        (1, 1, 1, 1, 64, 64),
        (8, 9, 3, 80, 64, 64),
        (3, 4, 4, 5, 8, 8),
        (2, 8, 4, 33, 20, 12),
        (2, 10, 2, 700, 96, 128),
        (1, 7, 1, 300, 128, 50),
    ],
)
def test_a_step_is_exact(rows, heads, key_heads, seen, width, value_width, masked, compiled_calls):
    queries = normal(rows, 1, heads, width).transpose(0, 2, 1, 3)
    # As in a cache: some positions at the end are not used yet.
    keys = normal(rows, key_heads, seen + 9, width, seed=1)[:, :, :seen]
    values = normal(rows, key_heads, seen + 9, value_width, seed=2)[:, :, :seen]
    mask = None
    if masked:
        shape = MASKS[masked](rows, seen)
        mask = mx.random.uniform(shape=shape, key=mx.random.key(3)) < 0.6
        mask = mask | (mx.arange(seen) == seen - 1)
    found = step(queries, keys, values, mask)
    np.testing.assert_allclose(found, exact(queries, keys, values, mask), rtol=2e-5, atol=2e-6)
    assert compiled_calls == ["attention"]


@pytest.mark.parametrize("width", [16, 20, 64])
@pytest.mark.parametrize("hidden", [1, 3, 8, 200])
def test_what_a_row_gives_does_not_depend_on_its_padding_or_on_other_rows(
    hidden, width, compiled_calls
):
    seen = 57
    queries = normal(4, 6, 1, width)
    keys, values = (normal(4, 2, hidden + seen, width, seed=seed) for seed in (1, 2))
    first = [0, hidden, hidden, hidden // 2]
    last = [hidden + seen, hidden + seen - 9, hidden + 1, hidden + seen]
    place = mx.arange(hidden + seen)
    mask = (place >= mx.array(first)[:, None]) & (place < mx.array(last)[:, None])
    together = step(queries, keys, values, mask[:, None, None])
    for row in range(4):
        one, own = slice(row, row + 1), slice(first[row], last[row])
        alone = step(queries[one], keys[one, :, own], values[one, :, own])
        np.testing.assert_array_equal(together[one], alone)
    assert compiled_calls == ["attention"] * 5


def test_where_no_key_is_seen_all_weigh_alike():
    queries, keys, values = normal(1, 2, 1, 64), normal(1, 2, 10, 64), normal(1, 2, 10, 64, seed=1)
    found = step(queries, keys, values, mx.zeros((1, 1, 1, 10), mx.bool_))
    np.testing.assert_allclose(found, np.array(values).mean(axis=2, keepdims=True), atol=1e-6)


def test_the_keys_of_a_large_cache_are_not_copied(compiled_calls):
    keys, values = normal(2, 2, 40_000, 64), normal(2, 2, 40_000, 64, seed=1)
    queries = normal(2, 4, 1, 64)
    mx.eval(keys, values, queries)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    step(queries, keys[:, :, :39_000], values[:, :, :39_000])
    # A copy of the keys alone has 40 MB.
    assert mx.get_peak_memory() - before < 2**20
    assert compiled_calls == ["attention"]


@pytest.mark.parametrize(
    ("queries", "keys"),
    [
        (normal(2, 4, 1, 64), normal(2, 2, 64, 30).swapaxes(-1, -2)),
        # As in a model that computes queries, keys and values by one product.
        (normal(2, 1, 4, 192).transpose(0, 2, 1, 3)[..., :64], normal(2, 2, 30, 64)),
        # One text for all rows.
        (normal(2, 4, 1, 64), normal(1, 2, 30, 64)),
    ],
    ids=["transposed keys", "queries with gaps", "keys of one row"],
)
def test_arrays_are_read_as_they_are_stored(queries, keys, compiled_calls):
    values = normal(len(keys), 2, 30, 64, seed=1)
    np.testing.assert_allclose(
        step(queries, keys, values), exact(queries, keys, values), rtol=2e-5, atol=2e-6
    )
    assert compiled_calls == ["attention"]


def test_shapes_that_do_not_fit_are_refused_as_before(compiled_calls):
    queries, keys = normal(2, 4, 1, 64), normal(2, 2, 30, 64)
    for wrong in (normal(2, 2, 29, 64), normal(3, 2, 30, 64)):
        with pytest.raises((ValueError, TypeCheckError)):
            step(queries, keys, wrong)
    assert not compiled_calls


def test_a_gradient_is_computed_by_operations_that_have_one(compiled_calls):
    queries, keys, values = normal(1, 2, 1, 64), normal(1, 1, 9, 64), normal(1, 1, 9, 64, seed=1)

    def total(queries: mx.array) -> mx.array:
        return scaled_dot_product_attention(queries, keys, values, None, SCALE, None).sum()

    assert mx.abs(mx.grad(total)(queries)).max() > 0
    assert not compiled_calls


def test_masks_of_heads_are_left_to_other_operations(compiled_calls):
    keys, values = normal(2, 2, 9, 64), normal(2, 2, 9, 64, seed=1)
    one, mask = normal(2, 2, 1, 64), mx.random.uniform(shape=(2, 2, 1, 9)) < 0.8
    mask = mask | (mx.arange(9) == 8)
    np.testing.assert_allclose(
        step(one, keys, values, mask), exact(one, keys, values, mask), rtol=2e-5, atol=2e-6
    )
    assert not compiled_calls

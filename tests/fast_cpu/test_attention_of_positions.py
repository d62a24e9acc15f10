"""Attention of many positions: exact with its gradients, and the same for a row beside others."""

import mlx.core as mx
import numpy as np
import pytest

from tests.fast_cpu.arrays import normal
from tests.memory import peak_of
from textpolicy import fast_cpu
from textpolicy.fast_cpu import attention
from textpolicy.fast_cpu.attention import scaled_dot_product_attention

pytestmark = pytest.mark.usefixtures("compiled_operations")

COUNTED = attention

SCALE = 0.3
VALUE, GRADIENT = "attention_of_positions", "attention_gradients"


def heads_of(rows: int, heads: int, time: int, width: int, seed: int = 0) -> mx.array:
    """Return heads as models do: positions lie before heads in memory."""
    x = normal(rows, time, heads * width, seed=seed)
    return x.reshape(rows, time, heads, width).transpose(0, 2, 1, 3)


def attend(queries: mx.array, keys: mx.array, values: mx.array, mask=None) -> mx.array:
    return scaled_dot_product_attention(queries, keys, values, None, SCALE, mask)


def seen_by(mask, time: int, seen: int) -> np.ndarray:
    """Return a mask that numpy can use."""
    if mask is None:
        return np.ones((time, seen), bool)
    if isinstance(mask, str):
        return np.arange(seen) <= np.arange(seen - time, seen)[:, None]
    return np.array(mask)


def exact(queries: mx.array, keys: mx.array, values: mx.array, mask, of_result: mx.array):
    """Return the result and the three gradients in float64 by numpy alone."""
    q, k, v, dy = (np.array(x, np.float64) for x in (queries, keys, values, of_result))
    rows, heads = q.shape[:2]
    shape, sharing = k.shape, heads // k.shape[1]
    k, v = (np.repeat(np.broadcast_to(x, (rows, *x.shape[1:])), sharing, axis=1) for x in (k, v))
    is_seen = seen_by(mask, q.shape[2], k.shape[2])
    scores = np.where(is_seen, SCALE * q @ k.swapaxes(-1, -2), -1e30)
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    y = p @ v
    slope = p * (dy @ v.swapaxes(-1, -2) - (dy * y).sum(axis=-1, keepdims=True)) * SCALE
    slope = np.where(is_seen, slope, 0)

    def of_key_heads(x: np.ndarray) -> np.ndarray:
        x = x.reshape(rows, shape[1], sharing, *x.shape[2:]).sum(axis=2)
        return x.sum(axis=0, keepdims=True) if shape[0] < rows else x

    of_keys, of_values = slope.swapaxes(-1, -2) @ q, p.swapaxes(-1, -2) @ dy
    return [y, slope @ k, of_key_heads(of_keys), of_key_heads(of_values)]


def with_gradients(queries: mx.array, keys: mx.array, values: mx.array, mask, of_result: mx.array):
    """Return the result and the three gradients."""
    arrays = [queries, keys, values]
    (y,), gradients = mx.vjp(lambda q, k, v: [attend(q, k, v, mask)], arrays, [of_result])
    return [y, *gradients]


def check(queries: mx.array, keys: mx.array, values: mx.array, mask=None) -> None:
    """Compare all numbers with those of numpy, relative to the largest.

    Of a position that sees no key, the numbers are not compared: they only have to be finite.
    """
    seen = seen_by(mask, queries.shape[2], keys.shape[2]).any(axis=-1, keepdims=True)
    of_result = normal(*queries.shape[:3], values.shape[-1], seed=9) * mx.array(seen)
    found = with_gradients(queries, keys, values, mask, of_result)
    expected = exact(queries, keys, values, mask, of_result)
    found[0], expected[0] = found[0] * mx.array(seen), expected[0] * seen
    for name, one, right in zip(("result", "of q", "of k", "of v"), found, expected, strict=True):
        assert one.shape == right.shape, name
        assert np.abs(np.array(one) - right).max() < 1e-5 * np.abs(right).max(), name


def random_mask(*shape: int) -> mx.array:
    """Return a mask in which each position sees the last key, and about half of the others."""
    mask = mx.random.uniform(shape=shape, key=mx.random.key(3)) < 0.5
    return mask | (mx.arange(shape[-1]) == shape[-1] - 1)


def padded(first: list[int], time: int, seen: int) -> mx.array:
    """Return the causal mask of rows that begin at these keys."""
    keys = mx.arange(seen)
    causal = keys <= mx.arange(seen - time, seen)[:, None]
    return (causal & (keys >= mx.array(first)[:, None, None]))[:, None]


MASKS = {
    "none": lambda *_: None,
    "causal": lambda *_: "causal",
    "one for all": lambda rows, heads, time, seen: random_mask(time, seen),
    "one for all positions": lambda rows, heads, time, seen: random_mask(seen),
    "one a row": lambda rows, heads, time, seen: random_mask(rows, 1, 1, seen),
    "one a row and position": lambda rows, heads, time, seen: random_mask(rows, 1, time, seen),
    "one a head": lambda rows, heads, time, seen: random_mask(heads, time, seen),
    "one for each": lambda rows, heads, time, seen: random_mask(rows, heads, time, seen),
    "padding": lambda rows, heads, time, seen: padded([*range(rows)], time, seen),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("rows", "heads", "key_heads", "time", "seen", "width", "value_width"),
    [
        (1, 1, 1, 2, 2, 16, 16),
        (3, 6, 2, 33, 33, 32, 32),
        (2, 4, 4, 7, 40, 48, 80),
        (2, 4, 1, 70, 301, 64, 16),
        (1, 2, 1, 300, 300, 16, 128),
        (1, 7, 7, 31, 65, 128, 112),
    ],
)
def test_values_and_gradients_are_exact(
    rows, heads, key_heads, time, seen, width, value_width, mask, compiled_calls, threads
):
    queries = heads_of(rows, heads, time, width)
    keys = heads_of(rows, key_heads, seen, width, seed=1)
    values = heads_of(rows, key_heads, seen, value_width, seed=2)
    check(queries, keys, values, MASKS[mask](rows, heads, time, seen))
    assert compiled_calls == [VALUE, GRADIENT]


@pytest.mark.parametrize("width", [*range(16, 129, 16)])
def test_each_width_has_its_numbers(width, compiled_calls):
    check(
        heads_of(1, 2, 35, width),
        heads_of(1, 1, 35, width, seed=1),
        heads_of(1, 1, 35, width, seed=2),
        "causal",
    )
    assert compiled_calls == [VALUE, GRADIENT]


LAYOUTS = {
    "side by side": (normal(2, 4, 40, 32), normal(2, 2, 50, 32), normal(2, 2, 50, 48)),
    "part of a cache": (
        heads_of(2, 4, 40, 32),
        normal(2, 2, 64, 32, seed=1)[:, :, :50],
        normal(2, 2, 64, 48, seed=2)[:, :, 7:57],
    ),
    "one product for all": (
        heads_of(2, 4, 40, 96)[..., :32],
        heads_of(2, 2, 50, 96, seed=1)[..., 32:64],
        heads_of(2, 2, 50, 96, seed=2)[..., 48:],
    ),
    "transposed": (
        normal(2, 4, 32, 40).swapaxes(-1, -2),
        normal(2, 2, 32, 50).swapaxes(-1, -2),
        normal(2, 2, 48, 50).swapaxes(-1, -2),
    ),
    "backwards": (
        normal(2, 4, 40, 32)[:, ::-1, ::-1],
        normal(2, 2, 50, 32)[::-1, :, ::-1],
        normal(2, 2, 50, 48)[:, ::-1, :, ::-1],
    ),
    "keys of one row": (heads_of(3, 4, 40, 32), normal(1, 2, 50, 32), normal(1, 2, 50, 48)),
    "keys of one row again and again": (
        heads_of(3, 4, 40, 32),
        mx.broadcast_to(normal(1, 2, 50, 32), (3, 2, 50, 32)),
        mx.broadcast_to(normal(1, 1, 50, 48), (3, 2, 50, 48)),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mask", ["none", "causal", "one for each"])
def test_arrays_are_read_as_they_are_stored(layout, mask, compiled_calls):
    queries, keys, values = LAYOUTS[layout]
    check(queries, keys, values, MASKS[mask](len(queries), 4, 40, 50))
    assert compiled_calls == [VALUE, GRADIENT]


def test_a_mask_is_read_as_it_is_stored():
    queries, keys, values = heads_of(2, 4, 40, 32), normal(2, 2, 50, 32), normal(2, 2, 50, 48)
    whole = random_mask(2, 4, 80, 100)
    for mask in (
        whole[:, :, ::2, 50:],
        random_mask(2, 4, 50, 40).swapaxes(-1, -2) | (mx.arange(50) == 0),
        mx.broadcast_to(random_mask(2, 1, 40, 50), (2, 4, 40, 50)),
        mx.broadcast_to(mx.array(True), (2, 1, 40, 50)),
    ):
        check(queries, keys, values, mask)


def test_a_gradient_with_gaps_is_read_as_it_is():
    queries, keys, values = (heads_of(1, 2, 40, 16, seed=seed) for seed in range(3))
    arrays = [queries, keys, values]
    of_result = exact(*arrays, "causal", mx.ones((1, 2, 40, 16)))
    for found, right in zip(
        mx.grad(lambda *all: attend(*all, "causal").sum(), argnums=(0, 1, 2))(*arrays),
        of_result[1:],
        strict=True,
    ):
        assert np.abs(np.array(found) - right).max() < 2e-5 * max(1, np.abs(right).max())


@pytest.mark.parametrize("hidden", [1, 5, 31, 32, 100, 290])
@pytest.mark.parametrize("width", [16, 64])
def test_what_a_row_gives_does_not_depend_on_its_padding_or_on_other_rows(hidden, width):
    time = 300
    first = [hidden, 0, hidden // 2]
    seen = hidden + time
    queries, keys, values = (heads_of(3, h, seen, width, seed=h) for h in (4, 2, 1))
    values = mx.concatenate([values, values + 1], axis=1)
    together = np.array(attend(queries, keys, values, padded(first, seen, seen)))
    for row, start in enumerate(first):
        part = slice(row, row + 1), slice(None), slice(start, None)
        alone = attend(
            queries[part], keys[part], values[part], padded([0], seen - start, seen - start)
        )
        np.testing.assert_array_equal(together[part], np.array(alone))


def test_what_rows_give_does_not_depend_on_how_many_threads_there_are(threads_restored):
    arrays = [heads_of(2, heads, 130, 32, seed=heads) for heads in (4, 2, 2)]
    results = []
    for threads in (1, 2, 5):
        fast_cpu.set_threads(threads)
        found = with_gradients(*arrays, "causal", normal(2, 4, 130, 32))
        results.append([np.array(one) for one in found])
    for other in results[1:]:
        for one, same in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(one, same)


def test_no_later_key_changes_what_a_position_gives():
    arrays = [heads_of(1, 2, 100, 16, seed=seed) for seed in range(3)]
    later = [x + 5 * (mx.arange(100) >= 60)[:, None] for x in arrays]
    one, other = (np.array(attend(*all, "causal"))[:, :, :60] for all in (arrays, later))
    np.testing.assert_array_equal(one, other)


def test_a_position_that_sees_no_key_gives_finite_numbers():
    queries, keys, values = (heads_of(2, 2, 40, 16, seed=seed) for seed in range(3))
    mask = random_mask(2, 1, 40, 40) & (mx.arange(40) != 3)[:, None]
    for hidden in (mask, mx.zeros((40, 40), mx.bool_)):
        found = with_gradients(queries, keys, values, hidden, normal(2, 2, 40, 16))
        assert all(np.isfinite(np.array(one)).all() for one in found)
    mean = np.array(values).mean(axis=2, keepdims=True)
    np.testing.assert_allclose(found[0], np.broadcast_to(mean, found[0].shape), atol=1e-5)


def test_large_scores_give_finite_numbers():
    queries, keys, values = (300 * heads_of(1, 2, 40, 16, seed=seed) for seed in range(3))
    found = with_gradients(queries, keys, values, "causal", normal(1, 2, 40, 16))
    assert all(np.isfinite(np.array(one)).all() for one in found)
    # The first position sees one key only.
    np.testing.assert_array_equal(np.array(found[0])[:, :, 0], np.array(values)[:, :, 0])


@pytest.mark.slow
def test_scores_of_a_long_text_never_exist_at_once():
    time, heads = 2500, 4
    arrays = [heads_of(1, heads, time, 16, seed=seed) for seed in range(3)]
    of_result = normal(1, heads, time, 16)
    mx.eval(arrays, of_result)
    peak = peak_of(lambda: mx.eval(with_gradients(*arrays, "causal", of_result)))
    scores = 4 * heads * time * time
    assert peak < scores / 10


@pytest.mark.parametrize(("width", "value_width"), [(20, 20), (8, 16), (32, 24)])
@pytest.mark.parametrize("mask", ["none", "causal", "one a row and position"])
def test_other_widths_are_left_to_other_operations(width, value_width, mask, compiled_calls):
    queries = heads_of(2, 4, 35, width)
    keys, values = heads_of(2, 2, 35, width, seed=1), heads_of(2, 2, 35, value_width, seed=2)
    check(queries, keys, values, MASKS[mask](2, 4, 35, 35))
    assert not compiled_calls


def test_other_dtypes_and_added_masks_are_left_to_mlx(compiled_calls):
    queries, keys, values = (heads_of(2, 2, 35, 32, seed=seed) for seed in range(3))
    of_result = normal(2, 2, 35, 32)
    right, *_ = exact(queries, keys, values, "causal", of_result)
    small = [x.astype(mx.bfloat16) for x in (queries, keys, values)]
    np.testing.assert_allclose(attend(*small, "causal").astype(mx.float32), right, atol=0.2)
    added = mx.where(mx.array(seen_by("causal", 35, 35)), 0.0, -1e9)
    np.testing.assert_allclose(attend(queries, keys, values, added), right, atol=1e-4)
    assert not compiled_calls


def test_gradients_are_the_same_in_a_checkpoint():
    arrays = [heads_of(1, 2, 40, 16, seed=seed) for seed in range(3)]

    def loss(*arrays: mx.array) -> mx.array:
        return mx.square(attend(*arrays, "causal")).sum()

    plain = mx.grad(loss, argnums=(0, 1, 2))(*arrays)
    kept = mx.grad(mx.checkpoint(loss), argnums=(0, 1, 2))(*arrays)
    for one, other in zip(plain, kept, strict=True):
        np.testing.assert_array_equal(np.array(one), np.array(other))

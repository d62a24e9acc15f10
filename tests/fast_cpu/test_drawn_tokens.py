"""Tokens drawn by one operation are those that mlx's operations draw from the same keys."""

import mlx.core as mx
import numpy as np
import pytest

from tests.fast_cpu.arrays import assert_close, normal
from textpolicy.fast_cpu import drawn_tokens as drawn_tokens_module
from textpolicy.fast_cpu.drawn_tokens import drawn_tokens
from textpolicy.fast_cpu.gradients import without_gradients
from textpolicy.generation.sampling import draw_tokens, random_keys
from textpolicy.types import Sampling

pytestmark = pytest.mark.usefixtures("compiled_operations")

COUNTED = drawn_tokens_module


def keys_of(rows: int, seed: int = 0) -> mx.array:
    return mx.array(random_keys(seed, [(0, row) for row in range(rows)]))


def draw(logits: mx.array, keys: mx.array) -> tuple[mx.array, mx.array]:
    with without_gradients():
        drawn = drawn_tokens(logits, keys)
    assert drawn is not None
    return drawn


def exact_logprobs(logits: mx.array, tokens: mx.array) -> np.ndarray:
    z = np.array(logits, np.float64)
    z -= z.max(axis=-1, keepdims=True)
    logprobs = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
    return logprobs[np.arange(len(z)), np.array(tokens)]


@pytest.mark.parametrize("size", [1, 2, 127, 128, 129, 1000, 50_000])
@pytest.mark.parametrize("sharpness", [0.0, 1.0, 9.0])
def test_tokens_are_those_of_mlx_operations(size, sharpness, threads, compiled_calls):
    logits, keys = sharpness * normal(64, size), keys_of(64)
    by_mlx, _ = draw_tokens(logits, keys, Sampling(max_tokens=1))
    assert not compiled_calls
    with without_gradients():
        tokens, logprobs = draw_tokens(logits, keys, Sampling(max_tokens=1))
    assert compiled_calls == ["drawn_tokens"]
    assert tokens.dtype == mx.uint32
    # A random number may lie on the boundary of two tokens, which rounding moves.
    assert (tokens != by_mlx).sum().item() <= 1
    assert_close(logprobs, exact_logprobs(logits, tokens), within=1e-6, least=1.0)


def test_random_numbers_are_those_of_mlx():
    """With two tokens in one block, the second number of a key alone decides."""
    rows = 5000
    keys = keys_of(rows)
    uniforms = mx.vmap(lambda key: mx.random.uniform(shape=(2,), key=key))(keys)[:, 1]
    for share in (0.01, 0.3, 0.5, 0.9):
        logits = mx.broadcast_to(mx.log(mx.array([share, 1 - share])), (rows, 2))
        tokens, _ = draw(logits, keys)
        is_first = np.array(uniforms) < share
        assert (np.array(tokens) == ~is_first).sum() >= rows - 1


@pytest.mark.parametrize("key", [(0, 0), (2**32 - 1, 2**32 - 1), (1, 0), (0x9E3779B9, 0x7F4A7C15)])
def test_every_key_draws_a_token(key):
    keys = mx.array([key], mx.uint32)
    logits = normal(1, 300)
    expected, _ = draw_tokens(logits, keys, Sampling(max_tokens=1))
    tokens, _ = draw(logits, keys)
    assert tokens.tolist() == expected.tolist()


def test_the_largest_random_numbers_are_below_one():
    """The first number of the first key, and the second of the second, are rounded to 2^32."""
    keys = mx.array([(1, 871727), (16, 616960)], mx.uint32)
    logits = mx.zeros((2, 300))
    expected, _ = draw_tokens(logits, keys, Sampling(max_tokens=1))
    tokens, _ = draw(logits, keys)
    assert tokens.tolist() == expected.tolist()
    assert tokens[0].item() >= 256 and tokens[1].item() in (127, 255, 299)


def test_tokens_come_as_often_as_they_are_likely():
    rows = 40_000
    logits = normal(1, 200) * 1.5
    tokens, _ = draw(mx.broadcast_to(logits, (rows, 200)), keys_of(rows, seed=5))
    found = np.bincount(np.array(tokens), minlength=200)
    expected = rows * np.exp(exact_logprobs(mx.repeat(logits, 200, 0), mx.arange(200)))
    likely = expected > 5
    squares = (found - expected)[likely] ** 2 / expected[likely]
    # The sum has about `likely.sum()` degrees of freedom: five standard deviations above.
    assert squares.sum() < likely.sum() + 5 * np.sqrt(2 * likely.sum())


def test_hidden_tokens_are_never_drawn():
    rows, size = 2000, 400
    shown = np.zeros(size, bool)
    shown[[3, 130, 131, 399]] = True
    hidden = mx.where(mx.array(shown), 0.0, -mx.inf)
    tokens, logprobs = draw(mx.broadcast_to(hidden, (rows, size)), keys_of(rows))
    assert {*np.array(tokens).tolist()} == {3, 130, 131, 399}
    np.testing.assert_allclose(np.array(logprobs), np.log(0.25), rtol=1e-6)


def test_a_row_that_is_no_distribution_has_no_logprob():
    logits = mx.array(normal(4, 300))
    logits[1, 7] = mx.nan
    logits[2] = -mx.inf
    clean, clean_logprobs = draw(logits[::3], keys_of(4)[::3])
    tokens, logprobs = draw(logits, keys_of(4))
    assert np.isnan(np.array(logprobs)).tolist() == [False, True, True, False]
    assert tokens[1:3].tolist() == [0, 0]
    assert tokens[::3].tolist() == clean.tolist()
    assert logprobs[::3].tolist() == clean_logprobs.tolist()


def test_a_row_has_the_same_bits_beside_any_others(threads):
    logits, keys = normal(40, 5000), keys_of(40)
    tokens, logprobs = draw(logits, keys)
    for row in (0, 17, 39):
        alone = draw(logits[row : row + 1], keys[row : row + 1])
        assert alone[0].tolist() == tokens[row : row + 1].tolist()
        assert alone[1].tolist() == logprobs[row : row + 1].tolist()


def test_logits_and_keys_are_read_where_they_lie():
    logits, keys = normal(20, 600), keys_of(20)
    views = logits[::2, 100:500], keys[::2]
    copies = mx.contiguous(views[0]), mx.contiguous(views[1])
    assert [one.tolist() for one in draw(*views)] == [one.tolist() for one in draw(*copies)]


def test_other_logits_are_left_to_mlx():
    keys = keys_of(2)
    assert drawn_tokens(normal(2, 9), keys) is None
    with without_gradients():
        assert drawn_tokens(normal(2, 9).astype(mx.float16), keys) is None
        assert drawn_tokens(mx.zeros((0, 9)), keys[:0]) is None

"""Log-probabilities by compiled functions: exact with their gradients, one chunk in memory."""

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from tests.fast_cpu.arrays import assert_close, normal
from tests.memory import peak_of
from textpolicy.fast_cpu import compiled_logprobs
from textpolicy.training.output_head import OutputHead
from textpolicy.training.token_logprobs import logprobs_from_logits

pytestmark = pytest.mark.usefixtures("compiled_operations")

COUNTED = compiled_logprobs


def positions(rows: int, vocabulary: int) -> tuple[mx.array, mx.array]:
    """Return tokens and temperatures."""
    tokens = mx.random.randint(0, vocabulary, (rows,), key=mx.random.key(7))
    return tokens, mx.random.uniform(0.3, 2.0, (rows,), key=mx.random.key(8))


def exact(logits, tokens: mx.array, temperature: mx.array) -> list[np.ndarray]:
    """Return values, entropies and the slopes of both by the logits, in float64 by numpy alone."""
    t = np.array(temperature, np.float64)[:, None]
    z = np.array(logits, np.float64) / t
    z -= z.max(axis=-1, keepdims=True)
    p = np.exp(z) / np.exp(z).sum(axis=-1, keepdims=True)
    log_p = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
    finite = np.where(p > 0, log_p, 0)
    entropy = -(p * finite).sum(axis=-1)
    at = np.arange(len(p)), np.array(tokens)
    of_logp = -p / t
    of_logp[at] += 1 / t[:, 0]
    return [log_p[at], entropy, of_logp, -p * (finite + entropy[:, None]) / t]


def head_of(vocabulary: int, width: int, *, tied: bool) -> OutputHead:
    model = nn.Module()
    model.model = nn.Module()
    if tied:
        model.model.embed_tokens = nn.Embedding(vocabulary, width)
    else:
        model.lm_head = nn.Linear(width, vocabulary, bias=False)
    head = OutputHead(model, tied)
    head.weights.weight = normal(vocabulary, width, seed=5) * 2 / width**0.5
    model.freeze()
    return head


SIZES = [(1, 1), (1, 7), (19, 7), (19, 2048), (3, 4096), (2, 4097), (5, 50_000)]


@pytest.mark.parametrize(("rows", "vocabulary"), SIZES)
def test_values_and_gradients_of_logits_are_exact(rows, vocabulary, compiled_calls, threads):
    logits, (tokens, temperature) = 3 * normal(rows, vocabulary), positions(rows, vocabulary)
    weights = [normal(rows, seed=1), normal(rows, seed=2)]
    (logp, entropy), (gradient,) = mx.vjp(
        lambda x: logprobs_from_logits(x, tokens, temperature), [logits], weights
    )
    *values, of_logp, of_entropy = exact(logits, tokens, temperature)
    assert_close(logp, values[0])
    assert_close(entropy, values[1])
    a, b = (np.array(w, np.float64)[:, None] for w in weights)
    assert_close(gradient, a * of_logp + b * of_entropy)
    assert compiled_calls == ["logprobs_of_logits"]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunk_rows", [1, 2, 100])
@pytest.mark.parametrize(("rows", "vocabulary"), SIZES)
def test_values_and_gradients_of_a_frozen_head_are_exact(
    rows, vocabulary, chunk_rows, tied, compiled_calls
):
    head, hidden = head_of(vocabulary, 24, tied=tied), normal(rows, 24)
    tokens, temperature = positions(rows, vocabulary)
    weights = [normal(rows, seed=1), normal(rows, seed=2)]
    size = chunk_rows * 4 * vocabulary

    def logprobs(hidden: mx.array, **options: bool):
        return head.logprobs(hidden, tokens, temperature, chunk_bytes=size, **options)

    (logp, entropy), (gradient,) = mx.vjp(logprobs, [hidden], weights)
    matrix = np.array(head.weights.weight, np.float64)
    logits = np.array(hidden, np.float64) @ matrix.T
    *values, of_logp, of_entropy = exact(logits, tokens, temperature)
    assert_close(logp, values[0])
    assert_close(entropy, values[1])
    a, b = (np.array(w, np.float64)[:, None] for w in weights)
    assert_close(gradient, (a * of_logp + b * of_entropy) @ matrix)
    assert compiled_calls[0] == "logprobs_of_hidden"
    for one, other in zip(logprobs(hidden, differentiable=False), (logp, entropy), strict=True):
        np.testing.assert_array_equal(np.array(one), np.array(other))


@pytest.mark.parametrize("rows", [1, 9, 60])
@pytest.mark.parametrize("chunk", [1, 4, 7, 1000])
def test_slopes_of_hidden_states_are_exact_in_chunks_of_any_size(rows, chunk, threads):
    hidden, matrix = normal(rows, 33), normal(500, 33, seed=1) / 4
    tokens, temperature = positions(rows, 500)
    logits = np.array(hidden, np.float64) @ np.array(matrix, np.float64).T
    logp, entropy, of_logp, _ = exact(logits, tokens, temperature)
    found = compiled_logprobs.of_hidden_with_slopes(hidden, matrix, tokens, temperature, chunk)
    assert_close(found[0], logp)
    assert_close(found[1], entropy)
    assert_close(found[2], of_logp @ np.array(matrix, np.float64))
    values = compiled_logprobs.of_hidden(hidden, matrix, tokens, temperature, chunk)
    for one, other in zip(values, found[:2], strict=True):
        np.testing.assert_array_equal(np.array(one), np.array(other))


def test_arrays_whose_numbers_are_not_side_by_side_are_read_as_they_are():
    hidden, matrix = normal(33, 12).T, normal(33, 1000, seed=1).T[::2] / 4
    tokens, temperature = positions(24, 500)
    tokens, temperature = tokens[::2], mx.broadcast_to(temperature[:1], (12,))
    logits = np.array(hidden, np.float64) @ np.array(matrix, np.float64).T
    expected = exact(logits, tokens, temperature)
    found = compiled_logprobs.of_hidden_with_slopes(hidden, matrix, tokens, temperature, 5)
    assert_close(found[0], expected[0])
    assert_close(found[2], expected[2] @ np.array(matrix, np.float64))
    views = (mx.array(logits.astype(np.float32)).T + 0).T, tokens, temperature
    assert_close(compiled_logprobs.of_tokens(*views)[0], expected[0])


@pytest.mark.parametrize("vocabulary", [7, 2048, 50_000])
def test_tokens_that_no_row_can_draw_have_no_probability(vocabulary):
    logits = normal(4, vocabulary)
    hidden = mx.arange(vocabulary) % 7 == 3
    logits = mx.where(hidden, -mx.inf, logits)
    # The last row can draw one token only.
    logits[3] = mx.where(mx.arange(vocabulary) == 2, 1.0, -mx.inf)
    tokens, temperature = mx.array([0, 3, 4, 2]), mx.array([1.0, 0.5, 2.0, 1.0])
    logp, entropy = map(np.array, compiled_logprobs.of_tokens(logits, tokens, temperature))
    expected = exact(logits, tokens, temperature)
    assert logp[1] == -math.inf and np.isfinite(logp[[0, 2, 3]]).all()
    np.testing.assert_allclose(logp[[0, 2, 3]], expected[0][[0, 2, 3]], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(entropy, expected[1], rtol=1e-5, atol=1e-6)
    assert logp[3] == entropy[3] == 0


@pytest.mark.parametrize("wrong", [-1, 40, 2**31 - 1, -(2**31)])
def test_a_token_outside_the_vocabulary_has_no_number(wrong):
    tokens, temperature = positions(6, 40)
    tokens = mx.where(mx.arange(6) == 2, wrong, tokens).astype(mx.int32)
    hidden, matrix = normal(6, 16), normal(40, 16, seed=1)
    others = np.arange(6) != 2
    known = compiled_logprobs.of_tokens(hidden @ matrix.T, tokens, temperature)
    found = compiled_logprobs.of_hidden_with_slopes(hidden, matrix, tokens, temperature, 4)
    for logp, entropy, *_ in (known, found):
        assert math.isnan(logp[2].item()) and np.isfinite(np.array(logp)[others]).all()
        assert np.isfinite(np.array(entropy)).all()
    assert np.isfinite(np.array(found[2])[others]).all()


@pytest.mark.parametrize("dtype", [mx.int64, mx.int8])
def test_tokens_of_other_dtypes_are_taken(dtype):
    logits, (tokens, temperature) = normal(6, 40), positions(6, 40)
    one = compiled_logprobs.of_tokens(logits, tokens.astype(dtype), temperature)[0]
    assert_close(one, exact(logits, tokens, temperature)[0])


def test_a_small_difference_of_many_logits_is_not_lost():
    """In float32, a sum of so many numbers one after another is wrong in its fourth digit."""
    logits = 0.01 * normal(1, 200_000)
    tokens, temperature = mx.array([0]), mx.array([1.0])
    logp, entropy = compiled_logprobs.of_tokens(logits, tokens, temperature)
    expected = exact(logits, tokens, temperature)
    assert abs(logp.item() - expected[0][0]) < 2e-6
    assert abs(entropy.item() - expected[1][0]) < 2e-6


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_other_dtypes_are_left_to_other_operations(dtype, compiled_calls):
    head, hidden = head_of(40, 16, tied=False), normal(6, 16)
    tokens, temperature = positions(6, 40)
    head.weights.weight = head.weights.weight.astype(dtype)
    logits = hidden.astype(dtype) @ head.weights.weight.T
    found, _ = head.logprobs(hidden.astype(dtype), tokens, temperature)
    right, *_ = exact(logits.astype(mx.float32), tokens, temperature)
    np.testing.assert_allclose(found, right, atol=0.1)
    assert "logprobs_of_hidden" not in compiled_calls


def test_a_head_with_a_bias_is_left_to_other_operations(compiled_calls):
    head, hidden = head_of(40, 16, tied=False), normal(6, 16)
    tokens, temperature = positions(6, 40)
    head.weights.bias = normal(40, seed=3)
    head.model.freeze()
    for options in ({}, {"differentiable": False}):
        found, _ = head.logprobs(hidden, tokens, temperature, **options)
        assert_close(found, exact(head.project(hidden), tokens, temperature)[0])
    assert "logprobs_of_hidden" not in compiled_calls


def test_the_head_of_another_class_is_called_itself(compiled_calls):
    class Doubled(nn.Linear):
        def __call__(self, x):
            return 2 * super().__call__(x)

    head, hidden = head_of(40, 16, tied=False), normal(6, 16)
    head.weights.__class__ = Doubled
    tokens, temperature = positions(6, 40)
    found, _ = head.logprobs(hidden, tokens, temperature, differentiable=False)
    right, *_ = exact(2 * hidden @ head.weights.weight.T, tokens, temperature)
    assert_close(found, right)
    assert not compiled_calls


def test_a_large_head_takes_the_memory_of_one_chunk():
    vocabulary, rows, width = 30_000, 160, 16
    hidden, matrix = normal(rows, width), normal(vocabulary, width, seed=1)
    tokens, temperature = positions(rows, vocabulary)
    mx.eval(hidden, matrix, tokens, temperature)
    chunk = 4 * 10 * vocabulary

    def compute() -> None:
        mx.eval(compiled_logprobs.of_hidden_with_slopes(hidden, matrix, tokens, temperature, 10))

    assert chunk <= peak_of(compute) < 1.5 * chunk

"""The output head in chunks: the same numbers and gradients in less memory."""

from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from tests.memory import peak_of
from tests.tiny import qwen3_model
from textpolicy.adapters import quantize
from textpolicy.adapters.quantization.packed_product import use_fast_products
from textpolicy.fast_cpu.packed_weights import MOST_ROWS
from textpolicy.training.output_head import OutputHead, find_output_head
from textpolicy.training.token_logprobs import logprobs_from_logits

ONE_CHUNK, FIVE_POSITIONS = 2**20, 5 * 4 * 96


def model_and_head(**options):
    model = qwen3_model(**options)
    head = find_output_head(model)
    assert head is not None
    mx.eval(model.parameters())
    return model, head


def positions():
    """Return tokens and temperatures of 19 positions."""
    return mx.random.randint(0, 96, (19,)), mx.random.uniform(0.5, 2.0, (19,))


@pytest.mark.parametrize("tied", [True, False])
def test_a_trained_head_in_chunks_has_the_gradients_of_all_logits_at_once(tied):
    model, head = model_and_head(tie_word_embeddings=tied)
    assert head.tied is tied
    tokens, temperature = positions()

    def logprobs(chunk_bytes):
        hidden = head.body(tokens[None])[0]
        return head.logprobs(hidden, tokens, temperature, chunk_bytes=chunk_bytes)

    def total(chunk_bytes):
        logp, entropy = logprobs(chunk_bytes)
        return logp.sum() + 0.3 * entropy.sum()

    for whole, part in zip(logprobs(ONE_CHUNK), logprobs(FIVE_POSITIONS), strict=True):
        assert mx.allclose(whole, part, atol=1e-6)
    expected, found = (
        dict(tree_flatten(nn.value_and_grad(model, partial(total, size))()[1]))
        for size in (ONE_CHUNK, FIVE_POSITIONS)
    )
    assert found.keys() == expected.keys()
    largest = max(mx.abs(g).max().item() for g in expected.values())
    for name, gradient in expected.items():
        assert mx.abs(found[name] - gradient).max().item() < 3e-6 * largest, name


@pytest.mark.parametrize("chunk", [ONE_CHUNK, FIVE_POSITIONS])
def test_a_frozen_head_has_the_gradients_of_all_logits_at_once(chunk):
    model, head = model_and_head()
    hidden = mx.random.normal((19, 64))
    tokens, temperature = positions()
    weight = mx.random.normal((2, 19))

    def total(hidden, logprobs):
        logp, entropy = logprobs(hidden)
        return (weight[0] * logp + weight[1] * entropy).sum()

    def whole(hidden):
        return logprobs_from_logits(head.project(hidden), tokens, temperature)

    def frozen(hidden, **options):
        return head.logprobs(hidden, tokens, temperature, chunk_bytes=chunk, **options)

    model.freeze()
    for differentiable in (True, False):
        values = frozen(hidden, differentiable=differentiable)
        for found, expected in zip(values, whole(hidden), strict=True):
            assert mx.allclose(found, expected, atol=1e-6)
    expected, found = (mx.grad(total)(hidden, logprobs) for logprobs in (whole, frozen))
    assert mx.abs(found - expected).max().item() < 3e-6 * mx.abs(expected).max().item()


@pytest.mark.slow
def test_only_one_chunk_of_logits_is_in_memory():
    _, head = model_and_head(vocab_size=10_000)
    hidden, tokens = mx.random.normal((384, 64)), mx.zeros(384, dtype=mx.int32)
    logits_bytes = 384 * 10_000 * 4

    def peak(chunk_bytes):
        def total(hidden):
            logp, entropy = head.logprobs(hidden, tokens, mx.ones(384), chunk_bytes=chunk_bytes)
            return (logp + entropy).sum()

        mx.eval(hidden)
        return peak_of(lambda: mx.eval(mx.grad(total)(hidden)))

    whole, chunked = peak(2**40), peak(logits_bytes // 32)
    assert whole > 4 * logits_bytes
    assert chunked < whole / 4


@pytest.mark.slow
def test_a_frozen_head_keeps_no_logits_for_the_backward_pass():
    model, head = model_and_head(vocab_size=10_000)
    hidden, tokens = mx.random.normal((384, 64)), mx.zeros(384, dtype=mx.int32)

    def peak(trained):
        model.unfreeze() if trained else model.freeze()
        logp, gradient = mx.value_and_grad(
            lambda hidden: head.logprobs(hidden, tokens, mx.ones(384), chunk_bytes=2**20)[0].sum()
        )(hidden)
        return peak_of(lambda: mx.eval(logp, gradient))

    mx.eval(hidden)
    assert peak(trained=False) < peak(trained=True)


@pytest.mark.parametrize(("mode", "bits"), [("affine", 4), ("affine", 6), ("nf4", 4)])
def test_a_quantized_head_is_unpacked_once_for_all_chunks(mode, bits):
    """Otherwise the unpacked weights of several chunks would be in memory at once."""
    model, head = model_and_head(vocab_size=10_000)
    rows, unpacked = 4 * MOST_ROWS, 10_000 * 64 * 4
    hidden, tokens = mx.random.normal((rows, 64)), mx.random.randint(0, 10_000, (rows,))

    def value(hidden, chunk_bytes):
        logprobs = head.logprobs(hidden, tokens, mx.ones(rows), chunk_bytes=chunk_bytes)
        return logprobs[0].sum()

    def peak():
        gradient = mx.grad(value)(hidden, rows * unpacked // 64 // 16)
        return peak_of(lambda: mx.eval(gradient))

    model.freeze()
    mx.eval(hidden)
    of_floats = peak()
    quantize(model, bits=bits, mode=mode)
    # A GPU keeps what a kernel reads until it has ended: for NF4, the levels beside their products.
    most = 2.5 if mode == "nf4" and mx.default_device().type != mx.cpu else 1.5
    assert peak() < of_floats + most * unpacked


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("mode", "bits"), [("affine", 4), ("affine", 6), ("nf4", 4)])
def test_a_quantized_head_that_is_unpacked_once_gives_the_head_s_own_numbers(mode, bits, dtype):
    model = qwen3_model(tie_word_embeddings=False)
    model.lm_head = nn.Linear(64, 96, bias=True)
    model.set_dtype(dtype)
    quantize(model, bits=bits, mode=mode)
    use_fast_products(model)
    head = OutputHead(model, tied=False)
    rows = 2 * MOST_ROWS
    hidden = mx.random.normal((rows, 64)).astype(dtype)
    tokens, temperature = mx.random.randint(0, 96, (rows,)), mx.ones(rows)

    def total(logprobs, hidden):
        logp, entropy = logprobs(hidden)
        return (logp + 0.3 * entropy).sum()

    def whole(hidden):
        return logprobs_from_logits(head.project(hidden), tokens, temperature)

    def in_chunks(hidden):
        return head.logprobs(hidden, tokens, temperature, chunk_bytes=FIVE_POSITIONS)

    bound = 1e-5 if dtype == mx.float32 else 0.03
    for found, expected in zip(in_chunks(hidden), whole(hidden), strict=True):
        assert mx.allclose(found, expected, atol=bound)
    expected, found = (mx.grad(partial(total, one))(hidden) for one in (whole, in_chunks))
    assert found.dtype == dtype
    assert mx.abs(found - expected).max().item() < bound * mx.abs(expected).max().item()


def test_a_model_whose_logits_are_more_than_a_projection_has_no_output_head():
    class Capped(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = qwen3_model().model
            self.lm_head = nn.Linear(64, 96)

        def __call__(self, tokens):
            return mx.tanh(self.lm_head(self.model(tokens)))

    assert find_output_head(Capped()) is None


@pytest.mark.parametrize("vocabulary", [49152, 151936, 100_003])
def test_logprobs_over_a_large_vocabulary_are_exact(vocabulary):
    logits = mx.random.normal((8, vocabulary)) * 3
    tokens = mx.random.randint(0, vocabulary, (8,))
    logp, entropy = logprobs_from_logits(logits, tokens, mx.ones(8))
    exact = np.array(logits).astype(np.float64)
    exact -= np.log(np.exp(exact).sum(axis=-1, keepdims=True))
    assert np.abs(np.array(logp) - exact[np.arange(8), np.array(tokens)]).max() < 3e-6
    assert np.abs(np.array(entropy) + (np.exp(exact) * exact).sum(axis=-1)).max() < 1e-5

"""The head in chunks, and activations computed again: the same numbers in less memory."""

from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from tests.logprobs import token_logprobs
from tests.memory import peak_of
from tests.tiny import qwen3_model
from tests.training.test_logprobs import RAGGED, batch_for, groups_of
from textpolicy.adapters import AdapterConfig, AdapterContainer
from textpolicy.training.checkpointing import recompute_activations
from textpolicy.training.logprobs import ModelLogprobs
from textpolicy.training.output_head import find_output_head
from textpolicy.training.softmax_logprobs import logprobs_from_logits


def adapted(load_tiny, **options):
    model, _ = load_tiny()
    container = AdapterContainer.from_model(model, AdapterConfig(rank=4, **options))
    keys = iter(mx.random.split(mx.random.key(0), 100))
    moved = {
        n: 0.1 * mx.random.normal(v.shape, key=next(keys))
        for n, v in container.parameters().items()
    }
    container.swap(moved, version=0)
    return model


def gradient_of(model: nn.Module, read, batch) -> dict[str, mx.array]:
    def objective():
        logp, entropy = read(batch)
        return mx.where(batch.mask, logp + 0.1 * entropy, 0).sum()

    _, gradient = nn.value_and_grad(model, objective)()
    mx.eval(gradient)
    return dict(tree_flatten(gradient))


def agree(found: dict[str, mx.array], expected: dict[str, mx.array]) -> None:
    assert found.keys() == expected.keys()
    largest = max(mx.abs(g).max().item() for g in expected.values())
    for name, gradient in expected.items():
        assert mx.abs(found[name] - gradient).max().item() < 3e-6 * largest, name


@pytest.mark.parametrize("tied", [True, False])
def test_scores_and_gradients_in_chunks_are_those_of_whole_logits(tied):
    model = qwen3_model(tie_word_embeddings=tied)
    head = find_output_head(model)
    assert head is not None
    assert head.tied is tied
    tokens = mx.random.randint(0, 96, (19,))
    temperature = mx.random.uniform(0.5, 2.0, (19,))

    def score(chunk_bytes):
        hidden = head.body(tokens[None])[0]
        return head.logprobs(hidden, tokens, temperature, chunk_bytes=chunk_bytes)

    def total(chunk_bytes):
        logp, entropy = score(chunk_bytes)
        return logp.sum() + 0.3 * entropy.sum()

    few = 5 * 4 * 96
    for whole, part in zip(score(2**20), score(few), strict=True):
        assert mx.allclose(whole, part, atol=1e-6)
    gradients = [
        dict(tree_flatten(nn.value_and_grad(model, partial(total, size))()[1]))
        for size in (2**20, few)
    ]
    agree(gradients[1], gradients[0])


@pytest.mark.parametrize("chunk", [2**20, 5 * 4 * 96])
def test_a_frozen_head_gives_the_gradients_of_whole_logits(chunk):
    model = qwen3_model()
    head = find_output_head(model)
    assert head is not None
    hidden = mx.random.normal((19, 64))
    tokens = mx.random.randint(0, 96, (19,))
    temperature = mx.random.uniform(0.5, 2.0, (19,))
    weight = mx.random.normal((2, 19))

    def total(hidden, score):
        logp, entropy = score(hidden)
        return (weight[0] * logp + weight[1] * entropy).sum()

    def whole(hidden):
        return logprobs_from_logits(head.project(hidden), tokens, temperature)

    def frozen(hidden, **options):
        return head.logprobs(hidden, tokens, temperature, chunk_bytes=chunk, **options)

    model.freeze()
    for differentiable in (True, False):
        scores = frozen(hidden, differentiable=differentiable)
        for found, expected in zip(scores, whole(hidden), strict=True):
            assert mx.allclose(found, expected, atol=1e-6)
    expected, found = (mx.grad(total)(hidden, score) for score in (whole, frozen))
    assert mx.abs(found - expected).max().item() < 3e-6 * mx.abs(expected).max().item()


def test_a_chunk_of_logits_is_all_that_is_alive():
    model = qwen3_model(vocab_size=10_000)
    head = find_output_head(model)
    assert head is not None
    hidden = mx.random.normal((384, 64))
    tokens = mx.zeros(384, dtype=mx.int32)
    logits_bytes = 384 * 10_000 * 4

    def peak(chunk_bytes):
        def total(hidden):
            logp, entropy = head.logprobs(hidden, tokens, mx.ones(384), chunk_bytes=chunk_bytes)
            return (logp + entropy).sum()

        mx.eval(model.parameters(), hidden)
        return peak_of(lambda: mx.eval(mx.grad(total)(hidden)))

    whole, chunked = peak(2**40), peak(logits_bytes // 32)
    assert whole > 4 * logits_bytes
    assert chunked < whole / 4


def test_only_positions_that_count_reach_the_head(load_tiny):
    model, _ = load_tiny()
    (batch,) = batch_for(groups_of(*RAGGED))
    logp, entropy = ModelLogprobs.of(model)(batch)
    plain = ModelLogprobs(model, None, share_prompts=False)(batch)
    assert mx.allclose(logp, plain[0], atol=1e-5)
    assert mx.allclose(entropy, plain[1], atol=1e-5)
    assert not mx.where(batch.mask, 0, logp).any().item()


def test_a_head_that_is_more_than_a_projection_is_left_to_the_model():
    class Capped(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = qwen3_model().model
            self.lm_head = nn.Linear(64, 96)

        def __call__(self, tokens):
            return mx.tanh(self.lm_head(self.model(tokens)))

    assert find_output_head(Capped()) is None


def test_a_frozen_head_keeps_no_logits_for_the_backward_pass():
    model = qwen3_model(vocab_size=10_000)
    head = find_output_head(model)
    assert head is not None
    hidden, tokens = mx.random.normal((384, 64)), mx.zeros(384, dtype=mx.int32)

    def after_forward(trained):
        model.unfreeze() if trained else model.freeze()
        logp, gradient = mx.value_and_grad(
            lambda hidden: head.logprobs(hidden, tokens, mx.ones(384), chunk_bytes=2**20)[0].sum()
        )(hidden)
        return peak_of(lambda: mx.eval(logp, gradient))

    mx.eval(model.parameters(), hidden)
    assert after_forward(False) < after_forward(True)


@pytest.mark.parametrize("share", [True, False])
def test_activations_computed_again_leave_gradients_as_they_are(load_tiny, share):
    model = adapted(load_tiny)
    read = ModelLogprobs(model, find_output_head(model), share)
    (batch,) = batch_for(groups_of(*RAGGED))
    plain = gradient_of(model, read, batch)
    with recompute_activations(model):
        again = gradient_of(model, read, batch)
    agree(again, plain)


def test_afterwards_the_model_is_as_it_was_and_others_never_changed(load_tiny):
    model, other = adapted(load_tiny), adapted(load_tiny)
    kinds = [type(block) for block in model.layers]
    parameters = {name: np.array(value) for name, value in tree_flatten(model.parameters())}
    tokens = mx.array([[1, 2, 3, 4]])
    with recompute_activations(model):
        assert [type(block) for block in model.layers] != kinds
        assert [type(block) for block in other.layers] == kinds
        inside, _ = token_logprobs(model, tokens, mx.ones(1))
    assert [type(block) for block in model.layers] == kinds
    outside, _ = token_logprobs(model, tokens, mx.ones(1))
    assert mx.array_equal(inside, outside)
    for name, value in tree_flatten(model.parameters()):
        assert np.array_equal(np.array(value), parameters[name]), name


def test_recomputing_activations_takes_less_memory():
    model = qwen3_model(layers=8)
    model.freeze()
    AdapterContainer.from_model(model, AdapterConfig(rank=2))
    (batch,) = batch_for(groups_of((4, [120] * 16)), size=16)
    read = ModelLogprobs(model, find_output_head(model), share_prompts=True)

    def peak():
        return peak_of(lambda: gradient_of(model, read, batch))

    kept = peak()
    with recompute_activations(model):
        assert peak() < kept / 2

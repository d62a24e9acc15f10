"""Gradient checkpointing: the same gradients and random numbers in less memory."""

from contextlib import nullcontext

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from tests.memory import peak_of
from tests.tiny import TOKENS, qwen3_model
from tests.training.rows import RAGGED, batches_of, groups_of
from textpolicy.adapters import AdapterConfig, AdapterContainer
from textpolicy.training.checkpoint import random_state
from textpolicy.training.gradient_checkpointing import recompute_activations
from textpolicy.training.logprobs import ModelLogprobs
from textpolicy.training.output_head import find_output_head


def adapted(model, **options):
    """Return the model with adapters that are far from zero."""
    container = AdapterContainer.from_model(model, AdapterConfig(rank=2, **options))
    container.swap({name: array + 0.05 for name, array in container.parameters().items()})
    return model, container


def gradient_of(logprobs, batch) -> dict[str, mx.array]:
    def objective():
        logp, entropy = logprobs(batch)
        return mx.where(batch.mask, logp + 0.1 * entropy, 0).sum()

    _, gradient = nn.value_and_grad(logprobs.model, objective)()
    mx.eval(gradient)
    return dict(tree_flatten(gradient))


@pytest.mark.parametrize("share", [True, False])
def test_recomputed_activations_change_no_gradient(load_tiny, share):
    model, _ = adapted(load_tiny()[0])
    logprobs = ModelLogprobs(model, find_output_head(model), share)
    (batch,) = batches_of(groups_of(*RAGGED))
    expected = gradient_of(logprobs, batch)
    with recompute_activations(model):
        found = gradient_of(logprobs, batch)
    assert found.keys() == expected.keys()
    largest = max(mx.abs(g).max().item() for g in expected.values())
    for name, gradient in expected.items():
        assert mx.abs(found[name] - gradient).max().item() < 3e-6 * largest, name


def test_the_model_is_restored_and_other_models_never_change(load_tiny):
    (model, _), (other, _) = adapted(load_tiny()[0]), adapted(load_tiny()[0])
    classes = [type(block) for block in model.layers]
    parameters = {name: np.array(value) for name, value in tree_flatten(model.parameters())}
    with recompute_activations(model):
        assert [type(block) for block in model.layers] != classes
        assert [type(block) for block in other.layers] == classes
        inside = model(TOKENS)
    assert [type(block) for block in model.layers] == classes
    assert mx.array_equal(inside, model(TOKENS))
    for name, value in tree_flatten(model.parameters()):
        assert np.array_equal(np.array(value), parameters[name]), name


@pytest.mark.slow
def test_recomputing_activations_takes_less_memory():
    model = qwen3_model(layers=8)
    model.freeze()
    AdapterContainer.from_model(model, AdapterConfig(rank=2))
    (batch,) = batches_of(groups_of((4, [120] * 16)), size=16)
    logprobs = ModelLogprobs(model, find_output_head(model), share_prompts=True)

    def peak():
        return peak_of(lambda: gradient_of(logprobs, batch))

    kept = peak()
    with recompute_activations(model):
        assert peak() < kept / 2


def test_the_backward_pass_repeats_the_dropout_of_the_forward_pass():
    model, container = adapted(qwen3_model(), dropout=0.4)
    tensors = container.parameters()
    name = "model.layers.0.self_attn.q_proj.lora_b"
    way = mx.random.normal(tensors[name].shape, key=mx.random.key(1))
    value_and_grad = nn.value_and_grad(model, lambda: mx.square(model(TOKENS)).mean())
    model.train()

    def at(distance):
        container.swap(tensors | {name: tensors[name] + distance * way})
        mx.random.seed(3)
        with recompute_activations(model):
            value, gradient = value_and_grad()
        return float(value), dict(tree_flatten(gradient))[name]

    slope = (at(0.01)[0] - at(-0.01)[0]) / 0.02
    assert float((at(0)[1] * way).sum()) == pytest.approx(slope, rel=0.02)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_random_state_moves_as_without_recomputing(dropout, compiled):
    model, _ = adapted(qwen3_model(), dropout=dropout)
    model.train()

    def gradients(recomputed):
        def step(tokens):
            with recompute_activations(model) if recomputed else nullcontext():
                value_and_grad = nn.value_and_grad(model, lambda: mx.square(model(tokens)).mean())
                return value_and_grad()

        state = [model.state, mx.random.state]
        run = mx.compile(step, inputs=state, outputs=state) if compiled else step
        mx.random.seed(3)
        values = []
        for _ in range(2):
            value, gradient = run(TOKENS)
            values.append((value, dict(tree_flatten(gradient))))
            mx.eval(value, gradient, mx.random.state)
        return values, random_state()

    (plain, plain_state), (again, again_state) = gradients(False), gradients(True)
    mx.random.seed(3)
    assert again_state == plain_state
    assert (plain_state == random_state()) is (dropout == 0)
    for (value, gradient), (other, others) in zip(plain, again, strict=True):
        assert mx.allclose(value, other, rtol=1e-6)
        for name, array in gradient.items():
            assert mx.allclose(array, others[name], rtol=1e-4, atol=1e-7), name
    assert bool(plain[0][0] != plain[1][0]) is (dropout > 0)

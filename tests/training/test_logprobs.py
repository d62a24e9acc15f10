"""Log-probabilities of batches: the numbers and the gradients of whole rows, in less memory."""

import time

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from tests.device_reads import reads_of
from tests.devices import launch_long_work
from tests.families import family_model
from tests.logprobs import token_logprobs
from tests.tiny import qwen3_model
from tests.training.rows import RAGGED, batches_of, groups_of
from textpolicy.adapters import AdapterConfig, AdapterContainer
from textpolicy.training.gradient_accumulation import accumulate_gradient
from textpolicy.training.logprobs import ModelLogprobs, can_share_prompts
from textpolicy.training.output_head import find_output_head


@pytest.fixture(scope="module")
def model(load_tiny):
    return load_tiny()[0]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("share", [True, False])
def test_rows_of_a_ragged_batch_have_the_logprobs_of_single_rows(model, temperature, share):
    groups = groups_of(*RAGGED, temperature=temperature)
    (batch,) = batches_of(groups)
    logp, entropy = ModelLogprobs(model, None, share)(batch)
    found = {}
    for b in range(batch.tokens.shape[0]):
        owner = batch.owner[b].item()
        prompt = batch.prompts[owner, : batch.prompt_lengths[owner].item()].tolist()
        count = int(batch.mask[b].sum().item())
        key = tuple(prompt + batch.tokens[b, :count].tolist())
        found[key] = (logp[b, :count], entropy[b, :count])
    for row in (r for g in groups for r in g.rollouts):
        alone = token_logprobs(model, mx.array([row.tokens]), mx.array([temperature]))
        given = row.mask.index(True)
        for together, expected in zip(found[tuple(row.tokens)], alone, strict=True):
            assert mx.allclose(together, expected[0, given:], rtol=1e-5, atol=1e-5)


def test_sharing_prompts_changes_no_gradient(model):
    (batch,) = batches_of(groups_of(*RAGGED))
    gradients = []
    for share in (True, False):

        def objective(share=share):
            logp, entropy = ModelLogprobs(model, None, share)(batch)
            return mx.where(batch.mask, logp + 0.1 * entropy, 0).sum()

        _, gradient = nn.value_and_grad(model, objective)()
        gradients.append(dict(tree_flatten(gradient)))
    largest = max(mx.abs(g).max().item() for g in gradients[1].values())
    for name, gradient in gradients[1].items():
        assert mx.abs(gradients[0][name] - gradient).max().item() < 3e-6 * largest, name


@pytest.mark.parametrize("family", ["qwen3", "mamba"])
def test_the_graph_of_a_micro_batch_is_built_while_the_device_computes_the_one_before(family):
    """Reading any number back would wait for all the work in flight."""
    model = family_model(family)
    (batch,) = batches_of(groups_of(*RAGGED, vocabulary=96))
    logprobs = ModelLogprobs(model, None, True)
    mx.eval(model.parameters(), logprobs(batch))

    def objective():
        logp, entropy = logprobs(batch)
        return mx.where(batch.mask, logp + 0.1 * entropy, 0).sum()

    work = launch_long_work()
    value, gradient = nn.value_and_grad(model, objective)()
    built = time.perf_counter()
    mx.eval(work)
    assert time.perf_counter() - built > 0.01
    mx.eval(value, gradient)


@pytest.mark.parametrize("family", ["qwen3", "mamba"])
def test_python_waits_once_for_each_micro_batch(family):
    model = family_model(family)
    (batch,) = batches_of(groups_of(*RAGGED, vocabulary=96))
    logprobs = ModelLogprobs(model, find_output_head(model), True)

    def loss(part):
        logp, entropy = logprobs(part)
        return mx.where(part.mask, logp + 0.1 * entropy, 0).sum(), {}

    few, many = (
        reads_of(
            lambda count=count: accumulate_gradient(model, loss, [batch] * count),
            host=[batch.mask, batch.prompt_lengths],
        )
        for count in (2, 5)
    )
    assert many - few == {"eval": 3}


@pytest.mark.parametrize("checkpoint", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(
    "family", ["mamba", "nemotron_h", "granitemoehybrid", "qwen3_5", "kimi_linear", "rwkv7"]
)
def test_completions_continue_the_state_of_a_shared_prompt(family, checkpoint):
    """The states of prompts of unequal length must not take in any padding."""
    model = family_model(family)
    AdapterContainer.from_model(model, AdapterConfig(rank=2))
    (batch,) = batches_of(groups_of(*RAGGED, vocabulary=96))
    gradients = []
    for share in (True, False):
        logprobs = ModelLogprobs(model, find_output_head(model), share)
        loss = lambda part, logprobs=logprobs: (logprobs(part)[0].mean(), {})  # noqa: E731
        gradient, _ = accumulate_gradient(model, loss, [batch], checkpoint=checkpoint and share)
        gradients.append(dict(tree_flatten(gradient)))
    largest = max(mx.abs(g).max().item() for g in gradients[1].values())
    for name, gradient in gradients[1].items():
        assert mx.abs(gradients[0][name] - gradient).max().item() < 3e-6 * largest, name


@pytest.mark.slow
def test_sharing_a_long_prompt_changes_no_gradient():
    model = qwen3_model(vocab_size=256, max_position_embeddings=1024)
    (batch,) = batches_of(groups_of((512, [64] * 16)))
    gradients = []
    for share in (True, False):
        logprobs = ModelLogprobs(model, find_output_head(model), share)
        objective = lambda logprobs=logprobs: logprobs(batch)[0].mean()  # noqa: E731
        gradients.append(dict(tree_flatten(nn.value_and_grad(model, objective)()[1])))
    assert max(mx.abs(gradient).max().item() for gradient in gradients[1].values()) > 1e-2
    for name, gradient in gradients[1].items():
        assert mx.abs(gradients[0][name] - gradient).max().item() < 1e-6, name


def test_logprobs_are_a_log_softmax_and_entropy_is_its_entropy(model):
    tokens = mx.array([[5, 6, 7, 8]])
    logp, entropy = token_logprobs(model, tokens, mx.array([0.5]))
    logits = np.array(model(tokens), dtype=np.float64)[0] / 0.5
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert logp[0].tolist() == pytest.approx([0, *expected[[0, 1, 2], [6, 7, 8]]], abs=1e-5)
    entropies = -(np.exp(expected) * expected).sum(-1)
    assert entropy[0].tolist() == pytest.approx([0, *entropies[:3]], abs=1e-5)


def test_only_counted_positions_reach_the_output_head(model):
    (batch,) = batches_of(groups_of(*RAGGED))
    logp, entropy = ModelLogprobs.of(model)(batch)
    plain = ModelLogprobs(model, None, share_prompts=False)(batch)
    assert mx.allclose(logp, plain[0], atol=1e-5)
    assert mx.allclose(entropy, plain[1], atol=1e-5)
    assert not mx.where(batch.mask, 0, logp).any().item()


def test_models_with_plain_attention_share_prompts(model):
    assert can_share_prompts(model)

"""Scoring: prompts shared by a group give the numbers and gradients of whole rows."""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from tests.logprobs import token_logprobs
from tests.test_types import rollout
from tests.tiny import qwen3_model
from textpolicy.training.batch import (
    BatchTotals,
    make_batch,
    split_into_micro_batches,
    training_rows,
)
from textpolicy.training.logprobs import ModelLogprobs, can_share_prompts
from textpolicy.training.output_head import find_output_head
from textpolicy.types import RolloutGroup, Sampling, Task


@pytest.fixture(scope="module")
def model(load_tiny):
    return load_tiny()[0]


def groups_of(*shapes: tuple[int, list[int]], temperature: float = 1.0) -> list[RolloutGroup]:
    """Groups with a prompt of the first length and completions of the others."""
    random = np.random.default_rng(0)
    draw = lambda n: random.integers(0, 250, n).tolist()  # noqa: E731
    groups = []
    for given, lengths in shapes:
        prompt = draw(given)
        members = [
            rollout(
                tokens=prompt + draw(drawn),
                mask=[False] * given + [True] * drawn,
                logprobs=[0.0] * given + [-1.0] * drawn,
                sampling=Sampling(temperature=temperature),
                reward=float(m),
            )
            for m, drawn in enumerate(lengths)
        ]
        groups.append(RolloutGroup(task=Task(id="t", prompt="p"), rollouts=members))
    return groups


RAGGED = [(9, [3, 7, 1]), (4, [2, 2, 5]), (1, [6, 4, 2])]


def batch_for(groups, size=None):
    rows = training_rows(groups)
    return [make_batch(part, BatchTotals.of(rows)) for part in split_into_micro_batches(rows, size)]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("share", [True, False])
def test_a_ragged_batch_scores_each_row_as_if_alone(model, temperature, share):
    groups = groups_of(*RAGGED, temperature=temperature)
    (batch,) = batch_for(groups)
    logp, entropy = ModelLogprobs(model, None, share)(batch)
    rows = sorted((r for g in groups for r in g.rollouts), key=lambda r: tuple(r.tokens))
    found = {}
    for b in range(batch.tokens.shape[0]):
        owner = batch.owner[b].item()
        prompt = batch.prompts[owner, : batch.prompt_lengths[owner].item()].tolist()
        count = int(batch.mask[b].sum().item())
        key = tuple(prompt + batch.tokens[b, :count].tolist())
        found[key] = (logp[b, :count], entropy[b, :count])
    for row in rows:
        alone, alone_entropy = token_logprobs(
            model, mx.array([row.tokens]), mx.array([temperature])
        )
        given = row.mask.index(True)
        together, together_entropy = found[tuple(row.tokens)]
        assert mx.allclose(together, alone[0, given:], rtol=1e-5, atol=1e-5)
        assert mx.allclose(together_entropy, alone_entropy[0, given:], rtol=1e-5, atol=1e-5)


def test_sharing_prompts_leaves_the_gradient_as_it_is(model):
    (batch,) = batch_for(groups_of(*RAGGED))
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


def test_logprobs_are_a_log_softmax_and_entropy_its_entropy(model):
    tokens = mx.array([[5, 6, 7, 8]])
    logp, entropy = token_logprobs(model, tokens, mx.array([0.5]))
    logits = np.array(model(tokens), dtype=np.float64)[0] / 0.5
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert logp[0].tolist() == pytest.approx([0, *expected[[0, 1, 2], [6, 7, 8]]], abs=1e-5)
    entropies = -(np.exp(expected) * expected).sum(-1)
    assert entropy[0].tolist() == pytest.approx([0, *entropies[:3]], abs=1e-5)


def test_the_loss_window_begins_where_sampling_began():
    """
    tokens  P P P a b T T c      P prompt, a b c sampled, T tool output
    mask    . . . x x . . x
    window        a b T T c
    """
    member = rollout(
        tokens=[1, 2, 3, 10, 11, 20, 21, 12],
        mask=[False] * 3 + [True, True, False, False, True],
        logprobs=[0, 0, 0, -0.1, -0.2, 0, 0, -0.3],
    )
    other = rollout(tokens=[1, 2, 3, 9], mask=[False] * 3 + [True], logprobs=[0, 0, 0, -0.5])
    group = RolloutGroup(task=Task(id="t", prompt="p"), rollouts=[member, other])
    (batch,) = batch_for([group])
    assert batch.prompts.tolist() == [[1, 2, 3]]
    assert batch.owner.tolist() == [0, 0]
    assert batch.tokens.tolist() == [[10, 11, 20, 21, 12], [9, 0, 0, 0, 0]]
    assert batch.mask.tolist() == [
        [True, True, False, False, True],
        [True, False, False, False, False],
    ]
    assert batch.logp_old[0].tolist() == pytest.approx([-0.1, -0.2, 0, 0, -0.3])
    assert (batch.rows, batch.token_count) == (2, 4)


def test_a_group_stays_together_in_its_micro_batch():
    batches = batch_for(groups_of((5, [9, 1, 2]), (5, [3, 3, 3]), (5, [8, 8, 1])), size=3)
    assert [batch.prompts.shape[0] for batch in batches] == [1, 1, 1]
    assert [batch.tokens.shape for batch in batches] == [(3, 3), (3, 8), (3, 9)]
    assert {batch.rows for batch in batches} == {9}


def lengths(parts):
    return [[len(row.mask) for row in part] for part in parts]


def test_micro_batches_are_whole_groups_within_a_number_of_tokens():
    rows = training_rows(
        groups_of((60, [100, 40]), (60, [300, 300]), (60, [90, 90]), (10, [200, 200]))
    )
    parts = split_into_micro_batches(rows, None)
    # With the third group, the first part would have six rows of 200 and three prompts of 60.
    assert lengths(parts) == [[90, 90, 100, 40], [200, 200], [300, 300]]


def test_a_group_with_more_tokens_is_cut_and_a_pair_is_not():
    (group,) = groups_of((700, [400, 250, 390, 300, 260]))
    assert lengths(split_into_micro_batches(training_rows([group]), None)) == [
        [250, 260],
        [300, 390],
        [400],
    ]
    (pair,) = groups_of((5, [3000, 2000]))
    assert lengths(split_into_micro_batches(training_rows([pair]), None)) == [[2000, 3000]]
    (long_prompt,) = groups_of((5000, [64] * 16))
    assert lengths(split_into_micro_batches(training_rows([long_prompt]), None)) == [[64] * 16]


def test_prompts_that_are_not_shared_count_for_every_row():
    rows = training_rows(groups_of((200, [56] * 8), (200, [20] * 2)))
    assert lengths(split_into_micro_batches(rows, None)) == [[20] * 2 + [56] * 8]
    alone = split_into_micro_batches(rows, None, share_prompts=False)
    assert lengths(alone) == [[20] * 2, [56] * 4, [56] * 4]


def test_groups_without_an_advantage_are_apart():
    rows = training_rows(groups_of((5, [3, 3]), (5, [2, 2]), (5, [4, 4])))
    rows = [replace(row, advantage=float(row.group == 2 and row.member)) for row in rows]
    for size in (None, 6):
        parts = split_into_micro_batches(rows, size)
        assert [[row.group for row in part] for part in parts] == [[2, 2], [1, 1, 0, 0]]


def test_sharing_a_long_prompt_leaves_the_gradient_as_it_is():
    model = qwen3_model(vocab_size=256, max_position_embeddings=1024)
    (batch,) = batch_for(groups_of((512, [64] * 16)))
    gradients = []
    for share in (True, False):
        read = ModelLogprobs(model, find_output_head(model), share)
        objective = lambda read=read: read(batch)[0].mean()  # noqa: E731
        gradients.append(dict(tree_flatten(nn.value_and_grad(model, objective)()[1])))
    assert max(mx.abs(gradient).max().item() for gradient in gradients[1].values()) > 1e-2
    for name, gradient in gradients[1].items():
        assert mx.abs(gradients[0][name] - gradient).max().item() < 1e-6, name


def test_models_with_plain_attention_share_prompts(model):
    assert can_share_prompts(model)

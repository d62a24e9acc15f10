"""Token weights and the penalty near the length limit, on numbers computed by hand."""

from dataclasses import replace
from functools import partial

import mlx.core as mx
import pytest

from tests.batches import batch_of, part_of
from textpolicy.algorithms.parts.overlong import soft_overlong_punishment, with_penalty
from textpolicy.algorithms.parts.reductions import quantile
from textpolicy.algorithms.parts.token_weights import (
    mask_sequences,
    mask_tokens,
    off_policy_mask,
    top_entropy_tokens,
    truncate_sequences,
    truncate_tokens,
)
from textpolicy.errors import ConfigError

# rho of tokens: 1, 4 | 1/4; of sequences: 4 | 1/4.
MASK = [[True, True], [True, False]]
OLD = mx.log(mx.array([[0.5, 0.8], [0.2, 0.5]]))
SAMPLED = mx.log(mx.array([[0.5, 0.2], [0.8, 0.1]]))


def batch(**changes):
    return batch_of(MASK, OLD, [1.0, -1.0], logp_sampled=SAMPLED, **changes)


@pytest.mark.parametrize(
    ("weight", "expected", "metric", "share"),
    [
        (partial(truncate_tokens, cap=2.0), [[1, 2], [0.25, 1]], "sampling/truncated", 1 / 3),
        (partial(mask_tokens, low=0.5, high=5.0), [[1, 4], [0, 1]], "sampling/masked", 1 / 3),
        (partial(truncate_sequences, cap=3.0), [[3], [0.25]], "sampling/truncated", 1 / 2),
        (partial(mask_sequences, low=0.0, high=3.0), [[0], [0.25]], "sampling/masked", 1 / 2),
    ],
)
def test_ratios_of_old_to_sampled_are_truncated_or_masked(weight, expected, metric, share):
    values, metrics = weight(OLD, batch())
    assert mx.allclose(values, mx.array(expected), atol=1e-6)
    assert metrics[metric].item() == pytest.approx(share)


@pytest.mark.parametrize("correct", [truncate_tokens, truncate_sequences])
def test_an_answer_of_one_token_counts_the_same_in_a_micro_batch_of_its_own(correct):
    whole = batch()
    first, second = part_of(whole, slice(0, 1)), part_of(whole, slice(1, 2))
    names = ("tokens", "mask", "logp_sampled", "logp_old", "advantages")
    second = replace(second, **{name: getattr(second, name)[:, :1] for name in names})
    # Under a cap of 0.1 every ratio is truncated.
    (_, all_of_it), *parts = (correct(one.logp_old, one, cap=0.1) for one in (whole, first, second))
    added = sum(metrics["sampling/truncated"].item() for _, metrics in parts)
    assert added == pytest.approx(all_of_it["sampling/truncated"].item()) == pytest.approx(1.0)


def test_only_bad_answers_that_the_policy_has_left_are_dropped():
    far = SAMPLED - 1.0
    keep, metrics = off_policy_mask(far, batch(), threshold=0.5)
    assert [row[0] for row in keep.tolist()] == [1, 0]
    assert metrics["off_policy_masked"].item() == 0.5
    near, _ = off_policy_mask(far, batch(), threshold=1.5)
    assert near[:, 0].tolist() == [1, 1]


def test_tokens_are_chosen_by_the_whole_batch_s_entropies():
    known = batch(entropy=mx.array([[0.1, 0.9], [0.5, 9.0]]), entropies=mx.array([0.9, 0.1, 0.5]))
    weight, metrics = top_entropy_tokens(OLD, known, fraction=0.5)
    assert weight.tolist() == [[0, 1], [1, 1]]
    assert metrics["entropy_threshold/max"].item() == 0.5


def test_of_equal_entropies_no_rounding_chooses():
    entropies = mx.array([0.2, 0.5, 0.5 + 1e-6, 0.5 - 1e-6, 0.9, 1.1])
    known = batch(entropy=mx.array([[0.5 - 1e-6, 0.5], [0.5 + 1e-6, 0.2]]), entropies=entropies)
    for fraction in (0.5, 0.6, 0.7):
        weight, _ = top_entropy_tokens(OLD, known, fraction=fraction)
        assert weight.tolist() == [[1, 1], [1, 0]]


def test_choosing_tokens_needs_entropies_from_before_the_update():
    with pytest.raises(ConfigError, match="old_logprobs='fresh'"):
        top_entropy_tokens(OLD, batch(), fraction=0.5)
    with pytest.raises(ConfigError, match="fraction of top_entropy_tokens is 0"):
        top_entropy_tokens(OLD, batch(), fraction=0)


def test_a_quantile_lies_between_its_neighbours():
    values = mx.array([3.0, 1.0, 2.0, 5.0])
    assert [quantile(values, at).item() for at in (0, 0.5, 1)] == [1, 2.5, 5]


def test_the_penalty_falls_over_the_last_tokens_before_the_limit():
    lengths = mx.array([10.0, 80, 90, 100, 120])
    penalty = soft_overlong_punishment(lengths, max_tokens=100, cache=20)
    assert penalty.tolist() == [0, 0, -0.5, -1, -1]
    with pytest.raises(ConfigError, match="cache is 0"):
        soft_overlong_punishment(lengths, max_tokens=100, cache=0)


def test_advantages_can_be_those_of_penalised_rewards():
    compute = with_penalty(lambda rewards: rewards, max_tokens=10, cache=4)
    advantages = compute(mx.array([[1.0, 1.0]]), lengths=mx.array([[5.0, 8.0]]))
    assert advantages.tolist() == [[1, 0.5]]

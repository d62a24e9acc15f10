"""Weights for what a sampler got wrong, and for tokens that matter: by hand."""

from dataclasses import replace

import mlx.core as mx
import pytest

from tests.batches import batch_of, part_of
from textpolicy.algorithms import correction
from textpolicy.algorithms.entropy import quantile, top_entropy_tokens
from textpolicy.algorithms.overlong import overlong_penalty, with_penalty
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
        (correction.truncate_tokens(2.0), [[1, 2], [0.25, 1]], "sampling/truncated", 1 / 3),
        (correction.mask_tokens(0.5, 5.0), [[1, 4], [0, 1]], "sampling/masked", 1 / 3),
        (correction.truncate_sequences(3.0), [[3], [0.25]], "sampling/truncated", 1 / 2),
        (correction.mask_sequences(0.0, 3.0), [[0], [0.25]], "sampling/masked", 1 / 2),
    ],
)
def test_ratios_of_old_to_sampled_are_truncated_or_masked(weight, expected, metric, share):
    values, metrics = weight(OLD, batch())
    assert mx.allclose(values, mx.array(expected), atol=1e-6)
    assert metrics[metric].item() == pytest.approx(share)


@pytest.mark.parametrize("correct", [correction.truncate_tokens, correction.truncate_sequences])
def test_an_answer_of_one_token_counts_the_same_in_a_micro_batch_of_its_own(correct):
    whole = batch()
    first, second = part_of(whole, slice(0, 1)), part_of(whole, slice(1, 2))
    names = ("tokens", "mask", "logp_sampled", "logp_old", "advantages")
    second = replace(second, **{name: getattr(second, name)[:, :1] for name in names})
    # Under a cap of 0.1 every ratio is truncated.
    (_, all_of_it), *parts = (correct(0.1)(one.logp_old, one) for one in (whole, first, second))
    added = sum(metrics["sampling/truncated"].item() for _, metrics in parts)
    assert added == pytest.approx(all_of_it["sampling/truncated"].item()) == pytest.approx(1.0)


def test_only_bad_answers_that_the_policy_has_left_are_dropped():
    far = SAMPLED - 1.0
    keep, metrics = correction.off_policy_mask(0.5)(far, batch())
    assert [row[0] for row in keep.tolist()] == [1, 0]
    assert metrics["off_policy_masked"].item() == 0.5
    near, _ = correction.off_policy_mask(1.5)(far, batch())
    assert near[:, 0].tolist() == [1, 1]


def test_tokens_are_chosen_by_the_whole_batch_s_entropies():
    known = batch(entropy=mx.array([[0.1, 0.9], [0.5, 9.0]]), entropies=mx.array([0.9, 0.1, 0.5]))
    weight, metrics = top_entropy_tokens(0.5)(OLD, known)
    assert weight.tolist() == [[0, 1], [1, 1]]
    assert metrics["entropy_threshold/max"].item() == 0.5


def test_of_equal_entropies_no_rounding_chooses():
    entropies = mx.array([0.2, 0.5, 0.5 + 1e-6, 0.5 - 1e-6, 0.9, 1.1])
    known = batch(entropy=mx.array([[0.5 - 1e-6, 0.5], [0.5 + 1e-6, 0.2]]), entropies=entropies)
    for fraction in (0.5, 0.6, 0.7):
        weight, _ = top_entropy_tokens(fraction)(OLD, known)
        assert weight.tolist() == [[1, 1], [1, 0]]


def test_choosing_tokens_needs_entropies_from_before_the_update():
    with pytest.raises(ConfigError, match="old_logprobs='fresh'"):
        top_entropy_tokens(0.5)(OLD, batch())
    with pytest.raises(ConfigError, match="fraction is 0"):
        top_entropy_tokens(0)


def test_a_quantile_lies_between_its_neighbours():
    values = mx.array([3.0, 1.0, 2.0, 5.0])
    assert [quantile(values, at).item() for at in (0, 0.5, 1)] == [1, 2.5, 5]


def test_the_penalty_falls_over_the_last_tokens_before_the_limit():
    lengths = mx.array([10.0, 80, 90, 100, 120])
    penalty = overlong_penalty(lengths, max_tokens=100, cache=20)
    assert penalty.tolist() == [0, 0, -0.5, -1, -1]
    with pytest.raises(ConfigError, match="cache is 0"):
        overlong_penalty(lengths, max_tokens=100, cache=0)


def test_advantages_can_be_those_of_penalised_rewards():
    compute = with_penalty(lambda rewards: rewards, max_tokens=10, cache=4)
    advantages = compute(mx.array([[1.0, 1.0]]), lengths=mx.array([[5.0, 8.0]]))
    assert advantages.tolist() == [[1, 0.5]]

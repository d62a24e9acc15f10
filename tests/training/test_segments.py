"""Rollouts in several segments: the same loss and gradient as the whole token sequence."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from tests.test_types import rollout
from tests.training.rows import groups_of
from tests.training.trainers import change_rollouts, make_trainer, weights
from textpolicy import algorithms
from textpolicy.algorithms.parts.reductions import center
from textpolicy.device_sizes import DeviceSizes, using_sizes
from textpolicy.tracking.samples import sample_rows
from textpolicy.training.batch import (
    BatchTotals,
    count_padded_tokens,
    make_batch,
    split_into_micro_batches,
    training_rows,
)
from textpolicy.types import NOT_SAMPLED, Rollout, RolloutGroup, Segment, Task

WITH_SEQUENCES = ["grpo", "gspo", "rloo", "luspo", "vespo", "dapo", "dr_grpo"]


def cut(whole: Rollout, pieces: int) -> Rollout:
    """Return the rollout in segments: each repeats the tokens before it as a part of its prompt."""
    begin = whole.mask.index(True)
    ends = np.linspace(begin, len(whole.tokens), pieces + 1).round().astype(int).tolist()
    segments = []
    for start, end in pairwise(ends):
        mask = [t >= start and whole.mask[t] for t in range(end)]
        logprobs = [p if m else 0.0 for p, m in zip(whole.logprobs[:end], mask, strict=True)]
        if any(mask):
            segments.append(Segment(tokens=whole.tokens[:end], mask=mask, logprobs=logprobs))
    first, *later = segments
    return replace(whole, **{k: getattr(first, k) for k in first.__slots__}, later=later)


def off_policy(groups: list[RolloutGroup]) -> list[RolloutGroup]:
    """Return the groups with log-probabilities that differ from those of the sampler."""
    noise = np.random.default_rng(0)

    def changes(one: Rollout, member: int):
        moved = [p + noise.normal(0, 0.1) if p else p for p in one.logprobs]
        return {"logprobs": moved, "version": NOT_SAMPLED, "reward": float(member % 3)}

    return change_rollouts(groups, changes)


def update(groups: list[RolloutGroup], name: str, size: int | None, **options):
    """Return the metrics and the moved weights of one update."""
    chosen = algorithms.get(name, **options)
    extra = {k: v for k, v in chosen.trainer.items() if k != "mini_batches"}
    model, trainer, _ = make_trainer(
        advantage_fn=chosen.compute_advantages,
        loss_fn=chosen.policy_loss,
        micro_batch_size=size,
        max_grad_norm=math.inf,
        **extra,
    )
    return trainer.train(groups), weights(model)


@pytest.mark.parametrize("size", [None, 3])
@pytest.mark.parametrize("name", WITH_SEQUENCES)
def test_a_rollout_that_is_cut_into_segments_gives_the_loss_and_the_gradient_of_the_whole(
    name, size
):
    _, _, sampled = make_trainer()
    whole = off_policy(sampled)
    segmented = change_rollouts(whole, lambda r, m: vars_of(cut(r, 1 + m)))
    assert max(len(r.segments) for group in segmented for r in group.rollouts) == 3
    metrics, moved = update(whole, name, None)
    metrics_cut, moved_cut = update(segmented, name, size)
    for metric, value in metrics.items():
        if not metric.startswith("time/"):
            assert metrics_cut[metric] == pytest.approx(value, abs=1e-5, rel=1e-4), metric
    assert_moved_alike(moved, moved_cut)


@pytest.mark.parametrize("average", ["token_mean", "sequence_mean", "sequence_sum"])
def test_every_average_weighs_a_rollout_in_segments_as_one_rollout(average):
    _, _, sampled = make_trainer()
    whole = off_policy(sampled)
    _, moved = update(whole, "grpo", None, average=average)
    segmented = change_rollouts(whole, lambda r, m: vars_of(cut(r, 1 + m)))
    _, moved_cut = update(segmented, "grpo", 2, average=average)
    assert_moved_alike(moved, moved_cut)


def test_pairs_of_rollouts_in_segments_are_compared_as_whole_completions():
    _, _, sampled = make_trainer()
    pairs = [replace(g, rollouts=g.rollouts[:2]) for g in off_policy(sampled)]
    metrics, moved = update(pairs, "dpo", None)
    segmented = change_rollouts(pairs, lambda r, m: vars_of(cut(r, 3 - m)))
    metrics_cut, moved_cut = update(segmented, "dpo", None)
    assert metrics_cut["rewards/margins"] == pytest.approx(metrics["rewards/margins"], abs=1e-5)
    assert_moved_alike(moved, moved_cut)


def test_the_baseline_and_the_divergence_are_those_of_rollouts_and_not_of_segments():
    seen = []

    def advantages(rewards, *, lengths):
        seen.append((rewards.tolist(), lengths.tolist()))
        return center(rewards)

    _, _, sampled = make_trainer()
    whole = off_policy(sampled)[:1]
    for groups in (whole, change_rollouts(whole, lambda r, m: vars_of(cut(r, 1 + m)))):
        _, trainer, _ = make_trainer(advantage_fn=advantages, reference="base", reward_kl=0.5)
        trainer.train(groups)
    (rewards, lengths), (rewards_cut, lengths_cut) = seen
    assert np.allclose(rewards, rewards_cut, atol=1e-5)
    assert lengths == lengths_cut


def test_all_segments_of_a_rollout_are_in_one_micro_batch():
    groups = change_rollouts(
        groups_of((5, [8, 8, 8]), (700, [600, 600, 600])), lambda r, m: vars_of(cut(r, 4))
    )
    rows = training_rows(groups)
    for size in (None, 1, 5):
        parts = split_into_micro_batches(rows, size)
        places = [{row.sequence for row in part} for part in parts]
        assert sum(map(len, places)) == 6
        assert sum(map(len, parts)) == 24
    (batch,) = [make_batch(rows, BatchTotals.of(rows))]
    assert batch.rows == 6
    assert batch.rollout is not None
    assert batch.rollout.tolist() == [n // 4 for n in range(24)]


def test_a_segment_without_a_sampled_token_has_no_row():
    empty = Segment(tokens=[1, 2], mask=[False, False], logprobs=[0.0, 0.0])
    group = RolloutGroup(task=Task(id="t", prompt="p"), rollouts=[rollout(later=[empty])])
    assert len(training_rows([group])) == 1


def test_a_row_of_samples_counts_all_segments_and_their_tokens():
    (group,) = change_rollouts(groups_of((5, [8, 8])), lambda r, m: vars_of(cut(r, 1 + m)))
    one, two = sample_rows(0, [group], [[0.0, 0.0]])
    assert "segments" not in one
    assert two["segments"] == 2
    assert one["tokens"] == two["tokens"] == 8


def test_a_segment_refuses_lists_of_unequal_length():
    with pytest.raises(ValueError, match="equal length; got 2, 1, 2"):
        Segment(tokens=[1, 2], mask=[True], logprobs=[0.0, 0.0])


def vars_of(one: Rollout) -> dict:
    return {name: getattr(one, name) for name in ("tokens", "mask", "logprobs", "later")}


def assert_moved_alike(found, expected) -> None:
    for name, value in expected.items():
        assert np.abs(found[name] - value).max() < 1e-5, name


def test_segments_with_long_prompts_of_their_own_are_in_memory_a_few_at_a_time():
    groups = change_rollouts(groups_of((300, [8] * 6)), lambda r, m: vars_of(cut(r, 4)))
    rows = training_rows(groups)
    assert count_padded_tokens(rows) > 5 * DeviceSizes().micro_batch_tokens
    # One rollout has more tokens than fit, and is not cut.
    with using_sizes(DeviceSizes()):
        for part in split_into_micro_batches(rows, None):
            assert len({row.sequence for row in part}) == 1

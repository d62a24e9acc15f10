"""GRPO: identities, then numbers that a reader can check by hand."""

from functools import partial

import mlx.core as mx
import numpy as np
import pytest

from tests.batches import batch_of, part_of, random_case
from textpolicy.algorithms import grpo
from textpolicy.errors import ConfigError


def test_groups_do_not_leak_into_each_other():
    together = grpo.compute_advantages(mx.array([[1.0, 0, 0, 0], [1, 1, 1, 0]]))
    alone = [grpo.compute_advantages(mx.array(r)) for r in ([1.0, 0, 0, 0], [1.0, 1, 1, 0])]
    assert mx.array_equal(together, mx.stack(alone))


def test_advantages_do_not_depend_on_the_reward_s_zero_or_unit():
    rewards = mx.array([[0.1, 0.9, 0.4], [3.0, 1.0, 2.0]])
    shifted = grpo.compute_advantages(rewards * 8 + 4, eps=0.0)
    assert mx.allclose(shifted, grpo.compute_advantages(rewards, eps=0.0), atol=1e-5)


@pytest.mark.parametrize("reward", [0.1, 0.7, -1e6, 1 / 3])
def test_a_constant_group_has_no_advantage_down_to_the_last_bit(reward):
    assert grpo.compute_advantages(mx.full((2, 7), reward)).tolist() == [[0] * 7] * 2


def test_a_rollout_without_a_reward_is_left_out_of_its_group():
    nan = float("nan")
    advantages = grpo.compute_advantages(mx.array([[1.0, nan, 0.0], [nan, nan, nan]]))
    pair = grpo.compute_advantages(mx.array([1.0, 0.0]))
    assert advantages.tolist() == [[pair[0].item(), 0, pair[1].item()], [0, 0, 0]]


def test_a_group_of_one_is_refused():
    with pytest.raises(ConfigError, match="group size is 1; expected at least 2"):
        grpo.compute_advantages(mx.array([[1.0], [0.0]]))


def test_on_policy_gradient_is_reinforce():
    logp, batch = random_case()
    on_policy = batch_of(batch.mask.tolist(), logp.tolist(), batch.advantages[:, 0].tolist())
    gradient = mx.grad(lambda x: grpo.policy_loss(x, on_policy)[0])(logp)
    weights = mx.where(batch.mask, batch.advantages, 0) / batch.mask.sum(axis=1, keepdims=True)
    assert mx.allclose(gradient, -weights / batch.rows, atol=1e-7)


def test_loss_ignores_everything_outside_the_mask():
    logp, batch = random_case()
    noise = mx.where(batch.mask, 0, mx.array([float("nan"), 9, -9, 1e30, 3]))
    loss, metrics = grpo.policy_loss(logp, batch)
    noisy_loss, noisy_metrics = grpo.policy_loss(logp + noise, batch)
    assert loss.item() == noisy_loss.item()
    assert {k: v.item() for k, v in metrics.items()} == {
        k: v.item() for k, v in noisy_metrics.items()
    }
    gradient = mx.grad(lambda x: grpo.policy_loss(x, batch)[0])(logp + noise)
    assert mx.all(mx.where(batch.mask, 0, gradient) == 0).item()


def test_slices_of_a_batch_add_up_to_the_whole():
    logp, batch = random_case()
    whole, whole_metrics = grpo.policy_loss(logp, batch)
    parts = []
    for rows in (slice(0, 1), slice(1, 4)):
        parts.append(grpo.policy_loss(logp[rows], part_of(batch, rows)))
    assert mx.allclose(whole, parts[0][0] + parts[1][0], atol=1e-7)
    for name, value in whole_metrics.items():
        assert mx.allclose(value, parts[0][1][name] + parts[1][1][name], atol=1e-7)


def test_clipping_stops_the_gradient_only_in_the_direction_already_taken():
    old = [[0.0], [0.0], [0.0], [0.0]]
    logp = mx.log(mx.array([[1.5], [1.5], [0.5], [0.5]]))
    batch = batch_of([[True]] * 4, old, [1.0, -1.0, 1.0, -1.0])
    gradient = mx.grad(lambda x: grpo.policy_loss(x, batch)[0])(logp)
    assert [value != 0 for (value,) in gradient.tolist()] == [False, True, True, False]
    _, metrics = grpo.policy_loss(logp, batch)
    assert metrics["clip_ratio/high_mean"].item() == 0.25
    assert metrics["clip_ratio/low_mean"].item() == 0.25


def test_by_hand():
    rewards = mx.array([1.0, 0, 0, 0])
    # mean 1/4, and a standard deviation of exactly 1/2 with n - 1.
    assert grpo.compute_advantages(rewards, eps=0.0).tolist() == [1.5, -0.5, -0.5, -0.5]
    # two rows: ratio 2 clipped to 1.2 with A = 1, and ratio 1 with A = -1 over two tokens.
    batch = batch_of([[True, False], [True, True]], [[-1.0, 0], [-2.0, -3.0]], [1.0, -1.0])
    logp = mx.array([[-1.0 + np.log(2.0), 0], [-2.0, -3.0]])
    assert grpo.policy_loss(logp, batch)[0].item() == pytest.approx((-1.2 + 1.0) / 2)


@pytest.mark.parametrize("bound", ["delta", "dual_clip"])
def test_a_bound_limits_the_loss_of_tokens_with_a_negative_advantage_only(bound):
    batch = batch_of([[True]] * 3, [[0.0]] * 3, [-1.0, -1.0, 1.0])
    logp = mx.log(mx.array([[10.0], [2.0], [10.0]]))
    loss = partial(grpo.policy_loss, batch=batch, **{bound: 3.0})
    assert loss(logp)[0].item() == pytest.approx((3.0 + 2.0 - 1.2) / 3)
    gradient = mx.grad(lambda x: loss(x)[0])(logp)
    assert [value != 0 for (value,) in gradient.tolist()] == [False, True, False]

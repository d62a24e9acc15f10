"""RLOO: the baseline of a reward is the mean of the other rewards of its group."""

import mlx.core as mx
import pytest

from textpolicy.algorithms import dr_grpo, rloo
from textpolicy.errors import ConfigError


def test_it_is_each_reward_less_the_mean_of_the_others():
    rewards = [3.0, 1.0, 8.0, 0.5]
    expected = [r - (sum(rewards) - r) / 3 for r in rewards]
    assert rloo.compute_advantages(mx.array(rewards)).tolist() == pytest.approx(expected)


def test_it_is_the_scaled_mean_centred_form():
    rewards = mx.array([[1.0, 0, 1], [0.25, 0.5, 0]])
    expected = dr_grpo.compute_advantages(rewards) * 3 / 2
    assert mx.allclose(rloo.compute_advantages(rewards), expected)


def test_a_rollout_without_a_reward_is_nobody_s_baseline():
    nan = float("nan")
    advantages = rloo.compute_advantages(mx.array([[1.0, nan, 0.0], [nan, 5.0, nan]]))
    assert advantages.tolist() == [[1, 0, -1], [0, 0, 0]]


def test_a_group_of_one_is_refused():
    with pytest.raises(ConfigError, match="group size is 1"):
        rloo.compute_advantages(mx.array([[1.0]]))

"""Dr. GRPO: no division by the group's standard deviation or by the answer's length."""

from functools import partial

import mlx.core as mx
import pytest

from tests.batches import batch_of, random_case
from textpolicy.algorithms import dr_grpo, grpo
from textpolicy.algorithms.parts.averages import constant
from textpolicy.errors import ConfigError


def test_advantages_by_hand():
    rewards = mx.array([[1.0, 0, 0, 0], [1, 1, 1, 0]])
    assert dr_grpo.compute_advantages(rewards).tolist() == [
        [0.75, -0.25, -0.25, -0.25],
        [0.25, 0.25, 0.25, -0.75],
    ]
    with pytest.raises(ConfigError, match="group size is 1"):
        dr_grpo.compute_advantages(mx.array([[1.0]]))


def test_answers_of_full_length_give_grpo():
    logp, batch = random_case()
    whole = batch_of([[True] * 5] * 4, batch.logp_old.tolist(), batch.advantages[:, 0].tolist())
    ours, _ = dr_grpo.policy_loss(logp, whole)
    assert mx.allclose(ours, grpo.policy_loss(logp, whole)[0], atol=1e-7)


def test_by_hand_the_constant_divides_whatever_the_length():
    batch = batch_of([[True, False], [True, True]], [[-1.0, 0], [-2.0, -3.0]], [1.0, -2.0])
    logp = mx.array([[-1.0, 0], [-2.0, -3.0]])
    loss, _ = dr_grpo.policy_loss(logp, batch, average=partial(constant, tokens=10))
    assert loss.item() == pytest.approx(-(1 - 2 - 2) / (2 * 10))

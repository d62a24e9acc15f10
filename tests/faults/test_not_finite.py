"""A number that is not finite never reaches the weights, wherever it comes from."""

import math

import mlx.core as mx
import pytest

from tests.training.trainers import change_rollouts, distance, make_trainer, weights
from textpolicy.algorithms import grpo

NUMBERS = {"NaN": math.nan, "infinite": math.inf, "minus infinite": -math.inf}


@mx.custom_function
def with_gradient(x, number):
    """Return x; the gradient of x is the number."""
    return x


@with_gradient.vjp
def _gradient(primals, cotangent, output):
    return mx.zeros_like(primals[0]) + primals[1], mx.zeros_like(primals[1])


def in_loss(number):
    def policy_loss(logp, batch):
        loss, metrics = grpo.policy_loss(logp, batch)
        return loss * number, metrics

    return {"loss_fn": policy_loss}


def in_one_logp(number):
    def policy_loss(logp, batch):
        first = mx.arange(logp.size).reshape(logp.shape) == mx.argmax(batch.mask.reshape(-1))
        return grpo.policy_loss(mx.where(first, logp * number, logp), batch)

    return {"loss_fn": policy_loss}


def in_gradient(number):
    def policy_loss(logp, batch):
        return grpo.policy_loss(with_gradient(logp, mx.array(number)), batch)

    return {"loss_fn": policy_loss}


def in_advantage(number):
    def compute_advantages(rewards):
        advantages = grpo.compute_advantages(rewards)
        return mx.where(
            mx.arange(advantages.size).reshape(advantages.shape) == 0, number, advantages
        )

    return {"advantage_fn": compute_advantages}


PLACES = [in_loss, in_one_logp, in_gradient, in_advantage]


@pytest.mark.proves("F6")
@pytest.mark.parametrize("number", NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_the_update_is_skipped_and_counted(place, number):
    model, trainer, groups = make_trainer(**place(number))
    before = weights(model)
    assert trainer.train(groups)["update_skipped/not_finite"] == 1
    assert distance(model, before) == 0
    assert trainer.version == 0


@pytest.mark.proves("F6")
@pytest.mark.parametrize("number", [math.inf, -math.inf])
def test_one_infinite_reward_is_a_skipped_update(number):
    model, trainer, groups = make_trainer()
    before = weights(model)
    groups = change_rollouts(groups, lambda r, m: {"reward": number if m == 0 else r.reward})
    assert trainer.train(groups)["update_skipped/not_finite"] == 1
    assert distance(model, before) == 0

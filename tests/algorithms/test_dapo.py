"""DAPO: every token of the batch has the same weight, and the upper clip is wider."""

import mlx.core as mx
import pytest

from tests.batches import batch_of, random_case
from textpolicy.algorithms import dapo, grpo


def test_with_equal_lengths_and_clips_it_is_grpo():
    logp, batch = random_case()
    whole = batch_of([[True] * 5] * 4, batch.logp_old.tolist(), batch.advantages[:, 0].tolist())
    ours, _ = dapo.policy_loss(logp, whole, clip_high=0.2)
    assert mx.allclose(ours, grpo.policy_loss(logp, whole)[0], atol=1e-7)


def test_by_hand_a_long_answer_weighs_by_its_length():
    batch = batch_of([[True, False], [True, True]], [[-1.0, 0], [-2.0, -3.0]], [1.0, -2.0])
    logp = mx.array([[-1.0, 0], [-2.0, -3.0]])
    assert dapo.policy_loss(logp, batch)[0].item() == pytest.approx(-(1 - 2 - 2) / 3)


def test_the_upper_clip_alone_is_wider():
    batch = batch_of([[True], [True]], [[0.0], [0.0]], [1.0, -1.0])
    between = mx.log(mx.array([[1.25], [0.75]]))
    gradient = mx.grad(lambda x: dapo.policy_loss(x, batch)[0])(between)
    assert [value != 0 for (value,) in gradient.tolist()] == [True, False]


def test_slices_of_a_batch_and_what_is_masked_are_as_for_grpo():
    logp, batch = random_case()
    noise = mx.where(batch.mask, 0, mx.array([float("nan"), 9, -9, 1e30, 3]))
    assert (
        dapo.policy_loss(logp, batch)[0].item() == dapo.policy_loss(logp + noise, batch)[0].item()
    )

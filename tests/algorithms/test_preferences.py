"""DPO and distillation, whose losses need the log-probabilities of a reference."""

import mlx.core as mx
import numpy as np
import pytest

from tests.batches import batch_of, part_of
from textpolicy.algorithms import distillation, dpo
from textpolicy.errors import ConfigError


def pairs():
    """Two pairs in a mixed order: rows 0 and 3 are chosen; logp exceeds the reference by h."""
    random = np.random.default_rng(0)
    mask = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 0]], bool)
    reference = random.normal(-1, 0.3, mask.shape)
    h = random.normal(0, 0.5, mask.shape)
    logp = mx.array(reference + h, dtype=mx.float32)
    batch = batch_of(
        mask,
        reference,
        [1.0, -1.0, -1.0, 1.0],
        logp_ref=mx.array(reference, dtype=mx.float32),
        group=mx.array([0, 0, 1, 1]),
    )
    return logp, batch, (h * mask).sum(1)


def test_dpo_is_the_logistic_loss_of_the_margin():
    logp, batch, h = pairs()
    margins = 0.3 * np.array([h[0] - h[1], h[3] - h[2]])
    loss, metrics = dpo.policy_loss(logp, batch, beta=0.3)
    assert loss.item() == pytest.approx(np.log1p(np.exp(-margins)).mean(), abs=1e-6)
    assert metrics["rewards/margins"].item() == pytest.approx(margins.mean(), abs=1e-6)
    assert metrics["rewards/accuracies"].item() == (margins > 0).mean()
    assert metrics["rewards/chosen"].item() == pytest.approx(0.15 * (h[0] + h[3]), abs=1e-6)


def test_at_the_reference_dpo_is_log_two_and_pulls_the_pair_apart():
    _, batch, _ = pairs()
    loss, gradient = mx.value_and_grad(lambda x: dpo.policy_loss(x, batch)[0])(batch.logp_ref)
    assert loss.item() == pytest.approx(np.log(2))
    sign = mx.where(batch.mask, -batch.advantages, 0)
    assert mx.array_equal(mx.sign(gradient), sign)


def test_label_smoothing_is_the_chance_of_a_wrong_label():
    logp, batch, _ = pairs()
    swapped = batch_of(
        batch.mask.tolist(),
        batch.logp_ref,
        [-1.0, 1.0, 1.0, -1.0],
        logp_ref=batch.logp_ref,
        group=batch.group,
    )
    right, wrong = (dpo.policy_loss(logp, b)[0].item() for b in (batch, swapped))
    smoothed = dpo.policy_loss(logp, batch, label_smoothing=0.2)[0].item()
    assert smoothed == pytest.approx(0.8 * right + 0.2 * wrong)


def test_pairs_add_up_and_halves_are_refused():
    logp, batch, _ = pairs()
    whole, _ = dpo.policy_loss(logp, batch)
    parts = [dpo.policy_loss(logp[s], part_of(batch, s))[0] for s in (slice(0, 2), slice(2, 4))]
    assert whole.item() == pytest.approx(sum(part.item() for part in parts))
    for rows in (slice(0, 3), slice(1, 3)):
        with pytest.raises(ConfigError, match=r"one completion of a pair.*even micro_batch_size"):
            dpo.policy_loss(logp[rows], part_of(batch, rows))


def test_a_pair_of_equals_teaches_nothing():
    assert dpo.compute_advantages(mx.array([[2.0, 1.0], [3.0, 3.0]])).tolist() == [[1, -1], [0, 0]]
    with pytest.raises(ConfigError, match="groups have 3 members; DPO expects pairs"):
        dpo.compute_advantages(mx.zeros((2, 3)))
    logp, batch, _ = pairs()
    tied = batch_of(
        batch.mask.tolist(),
        batch.logp_ref,
        [1.0, -1.0, 0.0, 0.0],
        logp_ref=batch.logp_ref,
        group=batch.group,
    )
    gradient = mx.grad(lambda x: dpo.policy_loss(x, tied)[0])(logp)
    assert gradient[:2].any().item()
    assert not gradient[2:].any().item()


def test_distillation_is_reinforce_with_the_teacher_s_opinion():
    logp, batch, _ = pairs()
    now = batch_of(batch.mask.tolist(), logp.tolist(), [1.0] * 4, logp_ref=batch.logp_ref)
    gradient = mx.grad(lambda x: distillation.policy_loss(x, now, weight=0.5)[0])(logp)
    opinion = 0.5 * (batch.logp_ref - logp)
    assert mx.allclose(gradient, mx.where(now.mask, -opinion / now.token_count, 0), atol=1e-6)


def test_distillation_needs_a_teacher():
    with pytest.raises(ConfigError, match="reference=teacher"):
        distillation.policy_loss(mx.zeros((1, 1)), batch_of([[True]], [[0.0]], [1.0]))

"""Options of the trainer: several updates, references, truncated rollouts, advantage keywords."""

import math

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest

from tests.training.trainers import (
    adapted_model,
    assert_same_weights,
    change_rollouts,
    constant_reward,
    distance,
    make_trainer,
    rising_reward,
    sample,
    weights,
)
from textpolicy import algorithms
from textpolicy.adapters import AdapterContainer
from textpolicy.algorithms import distillation, dpo, gdpo, grpo, rloo
from textpolicy.errors import ConfigError
from textpolicy.training.batch import (
    BatchTotals,
    make_batch,
    split_into_micro_batches,
    training_rows,
)
from textpolicy.training.logprobs import ModelLogprobs, add_logprobs
from textpolicy.training.optimizer import build_optimizer
from textpolicy.types import NOT_SAMPLED, StopReason


def recording(batches: list):
    """Return the loss of GRPO, which appends each batch to the list."""

    def loss(logp, batch):
        batches.append(batch)
        return grpo.policy_loss(logp, batch)

    return loss


# Several updates


def test_mini_batches_are_whole_groups_and_each_is_an_update():
    batches = []
    _, trainer, groups = make_trainer(
        reward=rising_reward(),
        mini_batches=2,
        loss_fn=recording(batches),
        optimizer=optim.SGD(learning_rate=5.0),
    )
    metrics = trainer.train(groups)
    assert [batch.rows for batch in batches] == [6, 6]
    assert [len(set(batch.group.tolist())) for batch in batches] == [2, 2]
    assert set(batches[0].group.tolist()).isdisjoint(batches[1].group.tolist())
    assert trainer.version == 1
    assert metrics["entropy"] != trainer.train(groups)["entropy"]
    assert metrics["sampling/sampling_logp_difference/mean"] < 1e-4, "of the first update"


@pytest.mark.slow
def test_epochs_use_all_groups_again():
    moves = []
    for epochs in (3, 1):
        model, trainer, groups = make_trainer(epochs=epochs, optimizer=optim.SGD(learning_rate=0.1))
        before = weights(model)
        trainer.train(groups)
        moves.append(distance(model, before))
    assert moves[0] > 1.5 * moves[1]


# Old log-probabilities and references


def test_fresh_old_logprobs_are_those_of_the_trainer():
    batches = []
    _, trainer, groups = make_trainer(
        reward=rising_reward(), old_logprobs="fresh", loss_fn=recording(batches)
    )

    def shifted(rollout, m):
        pairs = zip(rollout.logprobs, rollout.mask, strict=True)
        return {"logprobs": [x - 0.05 * sampled for x, sampled in pairs]}

    metrics = trainer.train(change_rollouts(groups, shifted))
    (batch,) = batches
    off = mx.where(batch.mask, batch.logp_old - batch.logp_sampled, 0).sum() / batch.token_count
    assert off.item() == pytest.approx(0.05, abs=1e-4)
    assert metrics["clip_ratio/region_mean"] == 0
    assert metrics["sampling/sampling_logp_difference/mean"] == pytest.approx(0.05, abs=1e-4)


@pytest.mark.slow
def test_the_choice_of_uncertain_tokens_does_not_depend_on_micro_batches():
    results = []
    for size in (None, 1):
        loss = algorithms.get("dapo", weights=["top_entropy_tokens(fraction=0.3)"]).policy_loss
        model, trainer, groups = make_trainer(
            loss_fn=loss, old_logprobs="fresh", micro_batch_size=size
        )
        trainer.train(groups)
        results.append(weights(model))
    assert_same_weights(results[1], results[0])


def test_the_kl_from_the_base_is_zero_at_step_zero_and_grows():
    loss = algorithms.get("grpo", beta=0.1).policy_loss
    _, trainer, groups = make_trainer(trained=False, loss_fn=loss, reference="base")
    assert trainer.train(groups)["kl"] == pytest.approx(0, abs=1e-7)
    assert trainer.train(groups)["kl"] > 1e-5


def test_the_base_reference_is_the_model_without_its_adapters(load_tiny):
    batches = []
    _, trainer, groups = make_trainer(
        reward=rising_reward(), reference="base", loss_fn=recording(batches)
    )
    trainer.train(groups)
    rows = training_rows(groups)
    (part,) = split_into_micro_batches(rows, None)
    (batch,) = batches
    expected, _ = ModelLogprobs.of(load_tiny()[0])(make_batch(part, BatchTotals.of(rows)))
    assert mx.allclose(batch.logp_ref, expected, atol=1e-5)


def test_the_kl_term_alone_pulls_adapters_to_the_base():
    _, trainer, groups = make_trainer(
        loss_fn=algorithms.get("grpo", beta=1.0).policy_loss,
        reference="base",
        reward=constant_reward,
        optimizer=optim.SGD(learning_rate=0.5),
    )
    found = [trainer.train(groups)["kl"] for _ in range(4)]
    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.9 * found[0]


def test_the_divergence_from_the_reference_is_subtracted_from_rewards():
    _, trainer, groups = make_trainer(
        reference="base", reward_kl=0.5, advantage_fn=rloo.compute_advantages
    )
    with trainer.adapters.disabled():
        rows = add_logprobs(training_rows(groups), reference=trainer._logprobs)
    metrics = trainer.train(groups)
    rewards = np.zeros((4, 3), np.float32)
    for row in rows:
        counted = np.array(row.rollout.mask[row.prompt_length :])
        cost = (row.logp_old - row.logp_ref)[counted].sum()
        rewards[row.group, row.member] = row.rollout.reward - 0.5 * cost
    expected = np.array(rloo.compute_advantages(mx.array(rewards)))
    assert metrics["advantages/max"] == pytest.approx(float(expected.max()), abs=1e-5)
    plain = np.array(
        rloo.compute_advantages(mx.array([[r.reward for r in g.rollouts] for g in groups]))
    )
    assert abs(float(plain.max()) - metrics["advantages/max"]) > 1e-3


@pytest.mark.learning
def test_preferences_are_learned():
    _, trainer, groups = make_trainer(
        advantage_fn=dpo.compute_advantages,
        loss_fn=dpo.policy_loss,
        reference="base",
        optimizer=build_optimizer(3e-3),
        micro_batch_size=2,
    )
    pairs = change_rollouts(groups, lambda r, m: {"reward": float(m), "version": NOT_SAMPLED})
    for pair in pairs:
        del pair.rollouts[2:]
    differing = [p for p in pairs if p.rollouts[0].tokens != p.rollouts[1].tokens]
    assert len(differing) >= 3
    history = [trainer.train(differing) for _ in range(12)]
    assert history[-1]["rewards/accuracies"] == pytest.approx(1)
    assert history[-1]["loss"] < history[0]["loss"] - 0.1
    assert not any(name.startswith("sampling/") for name in history[0])


@pytest.mark.learning
def test_a_student_comes_closer_to_its_teacher():
    teacher, tokenizer = adapted_model()
    container = AdapterContainer.of(teacher)
    far = {n: 0.1 * mx.random.normal(v.shape) for n, v in container.parameters().items()}
    container.swap(far, version=0)
    model, trainer, _ = make_trainer(
        trained=False,
        advantage_fn=distillation.compute_advantages,
        loss_fn=distillation.policy_loss,
        reference=teacher,
        optimizer=build_optimizer(2e-3),
    )
    found = [trainer.train(sample(model, tokenizer, size=4, seed=seed))["kl"] for seed in range(16)]
    assert np.mean(found[-5:]) < 0.7 * np.mean(found[:3])


# Truncated completions


def truncated(groups, members):
    """Return the groups as if these members had reached the length limit."""
    reached = {"stop_reason": StopReason.LENGTH}
    return change_rollouts(groups, lambda rollout, m: reached if m in members else {})


def test_truncated_completions_can_be_excluded_from_the_loss():
    batches = []
    _, trainer, groups = make_trainer(
        reward=rising_reward(), truncated="mask", loss_fn=recording(batches)
    )
    trainer.train(truncated(groups, {1}))
    (batch,) = batches
    whole = [r for g in groups for m, r in enumerate(g.rollouts) if m != 1]
    assert batch.rows == 12
    assert batch.token_count == int(batch.mask.sum()) == sum(sum(r.mask) for r in whole)
    assert batch.advantages.any(axis=1).sum().item() <= 8


def test_a_batch_of_truncated_completions_only_changes_nothing_and_is_reported():
    model, trainer, groups = make_trainer(truncated="mask")
    before = weights(model)
    metrics = trainer.train(truncated(groups, {0, 1, 2}))
    assert metrics["update_skipped/no_signal"] == 1
    assert distance(model, before) == 0
    assert {metrics["clip_ratio/low_min"], metrics["clip_ratio/high_max"]} == {0}
    assert all(math.isfinite(value) for value in metrics.values())


# Advantage functions


def test_advantage_functions_get_the_keywords_that_they_request():
    given = {}

    def advantages(rewards, *, lengths, parts, eps=1.0):
        given.update(rewards=rewards, lengths=lengths, parts=parts)
        return gdpo.compute_advantages(rewards, parts=parts)

    _, trainer, groups = make_trainer(advantage_fn=advantages)
    groups = change_rollouts(groups, lambda r, m: {"rewards": {"double": 2 * r.reward}})
    trainer.train(groups)
    assert given["lengths"].tolist() == [[sum(r.mask) for r in g.rollouts] for g in groups]
    assert given["parts"]["double"].tolist() == (2 * given["rewards"]).tolist()


def test_an_advantage_function_that_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match=r"the arguments \['values'\].*functools.partial"):
        make_trainer(advantage_fn=lambda rewards, values: rewards)
    _, trainer, groups = make_trainer(advantage_fn=lambda rewards: rewards[0])
    with pytest.raises(ConfigError, match="expected one advantage for each reward"):
        trainer.train(groups)

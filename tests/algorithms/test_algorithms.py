"""Identities that hold for every algorithm."""

from dataclasses import replace

import mlx.core as mx
import pytest

from tests.batches import batch_of, part_of, random_case
from textpolicy import algorithms
from textpolicy.algorithms import reinforce_pp
from textpolicy.algorithms.parts import averages, kl
from textpolicy.errors import ConfigError

# The average of each loss on policy, where its gradient is that of the average of -A logp.
AVERAGES = {
    "grpo": averages.sequence_mean,
    "dr_grpo": averages.length_limit,
    "dapo": averages.token_mean,
    "gspo": averages.sequence_mean,
    "luspo": averages.sequence_sum,
    "cispo": averages.token_mean,
    "sapo": averages.sequence_mean,
    "vespo": averages.token_mean,
    "lite_ppo": averages.token_mean,
    "reinforce": averages.token_mean,
    "reinforce_pp": averages.token_mean,
    "reinforce_pp_baseline": averages.token_mean,
    "rloo": averages.sequence_sum,
    "maxrl": averages.token_mean,
    "gdpo": averages.sequence_mean,
}
# Algorithms in which one group's advantages depend on other groups, through the batch's scale.
OVER_THE_BATCH = {"lite_ppo", "reinforce_pp", "reinforce_pp_baseline", "gdpo"}
NAN = float("nan")
TERMS = {
    "beta": 0.1,
    "kl": "unbiased_k3",
    "entropy_bonus": 0.05,
    "weights": (
        "truncate_tokens(cap=1.1)",
        "mask_sequences(low=0.2, high=4.0)",
        "off_policy_mask(threshold=0.1)",
        "top_entropy_tokens(fraction=0.6)",
    ),
}

# Their losses need a reference, and have files of tests of their own.
WITH_A_REFERENCE = {"dpo", "distillation"}

every_loss = pytest.mark.parametrize("name", AVERAGES)
composed = pytest.mark.parametrize("terms", [{}, TERMS], ids=["plain", "composed"])


def test_every_algorithm_is_in_the_table():
    assert AVERAGES.keys() | WITH_A_REFERENCE == set(algorithms.names())


def advantages_of(name: str, rewards: mx.array) -> mx.array:
    compute = algorithms.get(name).compute_advantages
    if name.startswith("reinforce_pp"):
        return compute(rewards, lengths=mx.broadcast_to(mx.array([3.0, 1, 4]), rewards.shape))
    if name == "gdpo":
        return compute(rewards, parts={"half": rewards / 2, "square": rewards**2})
    return compute(rewards)


def gradient_of(loss, logp: mx.array, batch) -> mx.array:
    return mx.grad(lambda x: loss(x, batch)[0])(logp)


@every_loss
def test_on_policy_the_gradient_is_reinforce(name):
    logp, batch = random_case()
    now = batch_of(batch.mask.tolist(), logp.tolist(), batch.advantages[:, 0].tolist())
    gradient = gradient_of(algorithms.get(name).policy_loss, logp, now)
    expected = mx.grad(lambda x: AVERAGES[name](-now.advantages * x, now))(logp)
    assert mx.abs(expected).max().item() > 0.01
    assert mx.allclose(gradient, expected, atol=1e-6)


@every_loss
@composed
def test_micro_batches_add_up_to_the_whole(name, terms):
    logp, batch = random_case(rows=6)
    loss = algorithms.get(name, **terms).policy_loss
    whole, metrics = loss(logp, batch)
    parts = [loss(logp[rows], part_of(batch, rows)) for rows in (slice(0, 1), slice(1, 6))]
    assert mx.allclose(whole, parts[0][0] + parts[1][0], atol=1e-6)
    for metric, value in metrics.items():
        combine = max if metric.endswith("max") else min if metric.endswith("min") else sum
        together = combine([part[1][metric].item() for part in parts])
        assert value.item() == pytest.approx(together, abs=1e-6), metric


@every_loss
@composed
def test_what_is_outside_the_mask_does_not_matter(name, terms):
    logp, batch = random_case()
    assert not batch.mask.all().item()
    noise = mx.where(batch.mask, 0, mx.array([NAN, 9, -9, 1e30, 3]))
    loss = algorithms.get(name, **terms).policy_loss
    clean, clean_metrics = loss(logp, batch)
    noisy, noisy_metrics = loss(logp + noise, batch)
    assert noisy.item() == clean.item()
    assert [x.item() for x in noisy_metrics.values()] == [x.item() for x in clean_metrics.values()]
    gradient = gradient_of(loss, logp + noise, batch)
    assert mx.all(mx.where(batch.mask, mx.isfinite(gradient), gradient == 0)).item()


@every_loss
def test_without_advantages_there_is_no_policy_gradient(name):
    logp, batch = random_case()
    idle = batch_of(batch.mask.tolist(), batch.logp_old.tolist(), [0.0] * 4)
    assert not gradient_of(algorithms.get(name).policy_loss, logp, idle).any()


# DPO has no KL term and no entropy bonus; its beta is another number.
@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {}) for name in algorithms.names()]
    + [
        (name, {option: 0.1})
        for name in algorithms.names()
        if name != "dpo"
        for option in ("beta", "entropy_bonus")
    ],
)
def test_the_trainer_may_skip_exactly_the_losses_without_a_gradient_at_zero_advantages(
    name, options
):
    logp, batch = random_case()
    algorithm = algorithms.get(name, **options)
    idle = batch_of(
        batch.mask.tolist(),
        batch.logp_old.tolist(),
        [0.0] * 4,
        logp_ref=batch.logp_ref,
        group=mx.array([0, 0, 1, 1]),
    )

    def loss(logp, entropy):
        return algorithm.policy_loss(logp, replace(idle, entropy=entropy))[0]

    gradients = mx.grad(loss, argnums=(0, 1))(logp, mx.ones_like(logp))
    has_gradient = any(gradient.any().item() for gradient in gradients)
    assert algorithm.trainer["skip_without_advantages"] is not has_gradient


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo", "cispo", "sapo", "reinforce"])
def test_for_answers_of_one_token_the_sequence_s_ratio_is_the_token_s(name):
    logp, batch = random_case(rows=6, time=1)
    by_token, by_sequence = (
        gradient_of(algorithms.get(name, ratio_level=level).policy_loss, logp, batch)
        for level in ("token", "sequence")
    )
    assert mx.allclose(by_token, by_sequence, atol=1e-7)


@pytest.mark.parametrize("name", sorted(set(AVERAGES) - OVER_THE_BATCH))
def test_groups_do_not_leak_into_each_other(name):
    rewards = mx.array([[1.0, 0, 0.5], [3, 1, 0], [0, 0.25, 1]])
    together = advantages_of(name, rewards)
    assert mx.array_equal(together, mx.concatenate([advantages_of(name, r[None]) for r in rewards]))


@pytest.mark.parametrize("name", AVERAGES)
@pytest.mark.parametrize("reward", [0.1, 0.7, 1 / 3, -4.0])
def test_a_constant_reward_has_no_advantage_down_to_the_last_bit(name, reward):
    assert advantages_of(name, mx.full((2, 3), reward)).tolist() == [[0] * 3] * 2


@pytest.mark.parametrize("name", AVERAGES)
def test_a_rollout_without_a_reward_gets_nothing_and_changes_nobody_s_baseline(name):
    with_hole = advantages_of(name, mx.array([[1.0, 0.0, NAN], [0.5, 0.25, NAN]]))
    assert with_hole[:, 2].tolist() == [0, 0]
    assert mx.all(mx.isfinite(with_hole)).item()
    if not name.startswith("reinforce_pp") and name != "gdpo":
        without = advantages_of(name, mx.array([[1.0, 0.0], [0.5, 0.25]]))
        assert mx.allclose(with_hole[:, :2], without, atol=1e-6)


@pytest.mark.parametrize("name", sorted(set(AVERAGES) - {"reinforce_pp"}))
def test_groups_of_one_are_refused(name):
    compute = algorithms.get(name).compute_advantages
    asked = {"lengths": mx.ones((2, 1))} if name == "reinforce_pp_baseline" else {}
    asked |= {"parts": {}} if name == "gdpo" else {}
    with pytest.raises(ConfigError, match="group size is 1; expected at least 2"):
        compute(mx.array([[1.0], [0.0]]), **asked)


def test_a_whole_batch_is_a_baseline_for_groups_of_one():
    rewards = mx.array([[1.0], [0.0]])
    advantages = reinforce_pp.compute_advantages(rewards, lengths=mx.array([[2.0], [2.0]]))
    # Two tokens of each: mean 1/2, sample variance (4 * 1/4) / 3.
    assert advantages.flatten().tolist() == pytest.approx([0.5 * 3**0.5, -0.5 * 3**0.5])


@pytest.mark.parametrize("estimator", [kl.k1, kl.k2, kl.k3, kl.unbiased_k3])
def test_the_divergence_from_the_reference_itself_is_zero(estimator):
    logp, batch = random_case()
    same = batch_of(batch.mask.tolist(), logp.tolist(), [0.0] * 4, logp_ref=logp)
    loss = algorithms.get("grpo", beta=0.5, kl=estimator).policy_loss
    assert loss(logp, same)[0].item() == 0


def test_the_useful_estimators_have_the_divergence_s_gradient():
    """Over every token of a small vocabulary, weighed by its probability."""
    logits = mx.array([0.3, -0.2, 1.1, 0.0])
    reference = mx.array([0.5, 0.1, -0.4, 0.2])
    reference = reference - mx.logsumexp(reference)

    def logp(x):
        return x - mx.logsumexp(x)

    def divergence(x):
        return (mx.exp(logp(x)) * (logp(x) - reference)).sum()

    old = mx.stop_gradient(logp(logits))

    def expected(x, estimator):
        distance, ratio = reference - logp(x), mx.exp(logp(x) - old)
        return (mx.exp(old) * estimator(distance[None], ratio[None])).sum()

    exact = mx.grad(divergence)(logits)
    for estimator, agrees in (
        (kl.k1, False),
        (kl.k2, True),
        (kl.k3, False),
        (kl.unbiased_k3, True),
    ):
        gradient = mx.grad(lambda x, e=estimator: expected(x, e))(logits)
        assert mx.allclose(gradient, exact, atol=1e-6).item() is agrees, estimator


def test_a_distance_that_would_overflow_is_held():
    logp, batch = random_case()
    far = batch_of(batch.mask.tolist(), logp.tolist(), [1.0] * 4, logp_ref=logp + 1e4)
    loss = algorithms.get("grpo", beta=0.1).policy_loss
    assert mx.isfinite(loss(logp, far)[0]).item()


def test_a_divergence_without_a_reference_says_what_to_do():
    logp, batch = random_case()
    alone = batch_of(batch.mask.tolist(), logp.tolist(), [1.0] * 4)
    with pytest.raises(ConfigError, match="reference='base'"):
        algorithms.get("grpo", beta=0.1).policy_loss(logp, alone)

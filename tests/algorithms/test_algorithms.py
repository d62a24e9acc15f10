"""What holds for every algorithm, whatever its paper."""

import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import mlx.core as mx
import pytest

from tests.batches import batch_of, part_of, random_case
from textpolicy import algorithms
from textpolicy.algorithms import averages, correction, entropy, kl, reinforce_pp
from textpolicy.algorithms.ratios import sequence_log_ratio, token_log_ratio
from textpolicy.config import ALGORITHMS
from textpolicy.errors import ConfigError

ROOT = Path(__file__).parents[2]
# How each loss averages, on policy: its gradient is that of the average of -A logp.
AVERAGES = {
    "grpo": averages.sequence_mean,
    "dr_grpo": averages.longest_length,
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
# Those whose scale is the batch's: one group's advantages depend on the others.
OVER_THE_BATCH = {"lite_ppo", "reinforce_pp", "reinforce_pp_baseline", "gdpo"}
NAN = float("nan")
TERMS = {
    "beta": 0.1,
    "kl": kl.unbiased_k3,
    "entropy_bonus": 0.05,
    "weights": (
        correction.truncate_tokens(1.1),
        correction.mask_sequences(0.2, 4.0),
        correction.off_policy_mask(0.1),
        entropy.top_entropy_tokens(0.6),
    ),
}

every_loss = pytest.mark.parametrize("name", AVERAGES)
composed = pytest.mark.parametrize("terms", [{}, TERMS], ids=["plain", "composed"])


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


@pytest.mark.parametrize("name", algorithms.names())
def test_a_loss_without_a_gradient_where_advantages_are_zero_lets_the_trainer_skip_it(name):
    logp, batch = random_case()
    ones = [mx.zeros_like(logp) - 1, batch.logp_old]
    for options in ({}, {"beta": 0.1}, {"entropy_bonus": 0.1}):
        if not set(options) <= set(algorithms.registry._keywords(algorithms.get(name).policy_loss)):
            continue
        algorithm = algorithms.get(name, **options)
        idle = batch_of(
            batch.mask.tolist(),
            batch.logp_old.tolist(),
            [0.0] * 4,
            logp_ref=ones[0],
            group=mx.array([0, 0, 1, 1]),
        )

        def loss(logp, entropy, batch=idle, algorithm=algorithm):
            return algorithm.policy_loss(logp, replace(batch, entropy=entropy))[0]

        slopes = mx.grad(loss, argnums=(0, 1))(logp, mx.ones_like(logp))
        has_gradient = any(slope.any().item() for slope in slopes)
        assert algorithm.trainer.get("skip_without_advantages", False) is not has_gradient, options


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo", "cispo", "sapo", "reinforce"])
def test_for_answers_of_one_token_the_sequence_s_ratio_is_the_token_s(name):
    logp, batch = random_case(rows=6, time=1)
    loss = algorithms.get(name).policy_loss
    by_token = gradient_of(partial(loss, ratio=token_log_ratio), logp, batch)
    by_sequence = gradient_of(partial(loss, ratio=sequence_log_ratio), logp, batch)
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


def test_names_lead_to_functions_with_options_bound():
    dapo = algorithms.get("dapo", clip_high=0.4, eps=0.0)
    assert dapo.dynamic_sampling
    assert dapo.compute_advantages(mx.array([1.0, 0, 0, 0])).tolist() == [1.5, -0.5, -0.5, -0.5]
    logp, batch = random_case()
    wide = algorithms.dapo.policy_loss(logp, batch, clip_high=0.4)[0]
    assert dapo.policy_loss(logp, batch)[0].item() == wide.item()


def test_an_unknown_name_or_option_suggests_the_nearest():
    with pytest.raises(ConfigError, match=r"no algorithm is called 'dappo'.*mean 'dapo'"):
        algorithms.get("dappo")
    with pytest.raises(ConfigError, match=r"no option 'clip_hihg'.*mean 'clip_high'"):
        algorithms.get("dapo", clip_hihg=0.3)


def test_one_line_makes_an_algorithm_known():
    from textpolicy.algorithms import dr_grpo, sapo

    algorithms.register("mine", dr_grpo.compute_advantages, sapo.policy_loss)
    assert algorithms.get("mine", tau_negative=1.2).name == "mine"
    with pytest.raises(ConfigError, match="already registered"):
        algorithms.register("mine", dr_grpo.compute_advantages, sapo.policy_loss)


def test_the_command_offers_every_algorithm():
    assert set(ALGORITHMS) == set(algorithms.names()) - {"mine"}


def test_the_pages_say_what_the_code_says():
    command = [sys.executable, str(ROOT / "tools" / "algorithm_pages.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    overview = (ROOT / "docs" / "algorithms.md").read_text()
    for name in set(algorithms.names()) - {"mine"}:
        assert f"[`{name}`](algorithms/{name}.md)" in overview

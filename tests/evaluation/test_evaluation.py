"""Evaluation: estimators equal counting, greedy equals cold sampling, intervals cover the mean."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from textpolicy.adapters import AdapterConfig, AdapterContainer
from textpolicy.environments import load
from textpolicy.errors import ConfigError, RewardError
from textpolicy.evaluation import HeldOut, MeanReward, compare, evaluate, evaluate_greedy, pass_at_k
from textpolicy.evaluation.compare import bootstrap_interval
from textpolicy.evaluation.evaluate import Evaluation
from textpolicy.generation.policy import ModelPolicy
from textpolicy.rewards import as_rewards, scorer_of
from textpolicy.tracking.named_numbers import named_numbers
from textpolicy.types import Rollout, RolloutGroup, Sampling, StopReason, Task


@pytest.mark.parametrize(("samples", "right"), [(1, 0), (1, 1), (5, 0), (5, 2), (6, 3), (4, 4)])
def test_pass_at_k_is_the_share_of_choices_that_hold_a_right_answer(samples, right):
    answers = [True] * right + [False] * (samples - right)
    for k in range(1, samples + 1):
        share = np.mean([any(choice) for choice in combinations(answers, k)])
        assert pass_at_k(samples, right, k) == pytest.approx(share)


def rollout(reward, completion="x"):
    return Rollout(
        tokens=[1, 2],
        mask=[False, True],
        logprobs=[0.0, 0.0],
        completion=completion,
        reward=reward,
        stop_reason=StopReason.STOP_TOKEN,
        sampling=Sampling(),
        version=0,
    )


def evaluation(greedy, sampled=(), good=0.5):
    tasks = [Task(id=str(number), prompt=f"p{number}") for number in range(len(sampled))]
    return Evaluation(
        greedy=[rollout(reward, f"said {reward}") for reward in greedy],
        sampled=[
            RolloutGroup(task=task, rollouts=[rollout(reward) for reward in rewards])
            for task, rewards in zip(tasks, sampled, strict=True)
        ],
        good=good,
    )


def test_the_numbers_of_an_evaluation_can_be_checked_by_hand():
    metrics = evaluation([1.0, 0.0], [[1, 0, 0, 0], [1, 1, 0.4, 0]]).metrics()
    assert metrics["eval/reward"] == 0.5
    assert metrics["eval/standard_error"] == pytest.approx(0.5 / 2**0.5)
    assert metrics["eval/avg@4"] == pytest.approx((1 / 4 + 2.4 / 4) / 2)
    assert metrics["eval/pass@1"] == pytest.approx((1 / 4 + 2 / 4) / 2)
    assert metrics["eval/pass@2"] == pytest.approx((3 / 6 + 5 / 6) / 2)
    assert metrics["eval/pass@4"] == 1
    assert {name for name in metrics if "@" in name} == {
        f"eval/{name}" for name in ("avg@4", "pass@1", "pass@2", "pass@4")
    }


def test_a_number_beside_the_reward_has_a_standard_error_as_the_reward_has_one():
    rollouts = [replace(rollout(x), metrics={"rewards/mine/exact": x}) for x in (1.0, 0.0)]
    # A reward may leave its number out, and an environment counts other things.
    rollouts.append(replace(rollout(0.5), metrics={"env/turns": 2.0}))
    metrics = Evaluation(greedy=rollouts, sampled=[], good=0.5).metrics()
    assert metrics["eval/rewards/mine/exact"] == 0.5
    assert metrics["eval/standard_errors/mine/exact"] == pytest.approx(0.5 / 2**0.5)
    assert not any("env" in name for name in metrics)


def test_each_of_several_rewards_is_measured_with_a_standard_error_and_a_single_one_is_not():
    values = ((1.0, 1.0), (1.0, 0.0))
    rollouts = [
        replace(rollout(form + right), rewards={"form": form, "right": right})
        for form, right in values
    ]
    metrics = Evaluation(greedy=rollouts, sampled=[], good=0.5).metrics()
    assert list(map(str, named_numbers(metrics, "eval/"))) == [
        "form 1.000 ± 0.000",
        f"right 0.500 ± {0.5 / 2**0.5:.3f}",
    ]
    single = [replace(rollout(1.0), rewards={"right": 1.0})]
    assert not any(
        "rewards/" in name for name in Evaluation(greedy=single, sampled=[], good=0.5).metrics()
    )


def test_a_sample_is_right_from_the_threshold_on():
    sampled = [[1, 0.4]]
    assert evaluation([1.0], sampled, good=0.4).metrics()["eval/pass@1"] == 1
    assert evaluation([1.0], sampled, good=0.5).metrics()["eval/pass@1"] == 0.5


def test_tasks_with_a_sample_without_a_reward_are_left_out_of_pass_at_k():
    metrics = evaluation([1.0], [[1, 0], [None, 1]]).metrics()
    assert metrics["eval/pass@1"] == 0.5


def test_an_evaluation_without_any_reward_is_an_error():
    with pytest.raises(RewardError, match="returned None for each of 2"):
        evaluation([None, None]).metrics()
    silent = evaluation([None, None])
    failed = [replace(rollout, error="no route") for rollout in silent.greedy]
    with pytest.raises(RewardError, match="because 2 calls failed; the first: no route"):
        replace(silent, greedy=failed).metrics()


@pytest.fixture(scope="module")
def policy(load_tiny):
    model, tokenizer = load_tiny()
    AdapterContainer.from_model(model, AdapterConfig(rank=2))
    return ModelPolicy(model, tokenizer, Sampling(max_tokens=6))


@pytest.fixture(scope="module")
def heldout():
    environment = load("add")
    with scorer_of(as_rewards(environment.reward)) as scorer:
        yield HeldOut(name="add", tasks=environment.heldout(8), scorer=scorer, max_tokens=6)


@pytest.fixture(scope="module")
def evaluated(policy, heldout):
    return evaluate(policy, heldout, samples=3)


@pytest.mark.slow
def test_an_evaluation_is_repeatable_after_other_sampling(policy, heldout, evaluated):
    policy.generate(["1+1="], n=2)
    assert evaluate(policy, heldout, samples=3) == evaluated
    assert {len(group.rollouts) for group in evaluated.sampled} == {3}


@pytest.mark.slow
def test_samples_differ_and_equal_the_greedy_answer_at_a_temperature_near_0(policy, heldout):
    cold = evaluate(policy, heldout, samples=2, temperature=1e-4)
    for greedy, group in zip(cold.greedy, cold.sampled, strict=True):
        assert {one.completion for one in group.rollouts} == {greedy.completion}
    hot = evaluate(policy, heldout, samples=2, temperature=3.0)
    assert any(len({one.completion for one in group.rollouts}) > 1 for group in hot.sampled)


def test_the_greedy_reward_is_the_same_with_and_without_samples(policy, heldout, evaluated):
    with_samples = evaluated.greedy_reward
    assert with_samples == evaluate_greedy(policy, heldout.tasks, heldout.scorer)
    assert isinstance(with_samples, MeanReward) and with_samples.count == 8


def test_a_comparison_names_the_tasks_that_differ_largest_gain_first():
    tasks = [Task(id=str(n), prompt=f"p{n}") for n in range(5)]
    before, after = evaluation([0, 0, 1, 0.5, None]), evaluation([1, 0, 0.8, 0.9, 1])
    comparison = compare(tasks, before, after)
    assert [d.prompt for d in comparison.differences] == ["p0", "p3", "p2"]
    assert comparison.differences[0].before == "said 0" and comparison.differences[0].gain == 1
    assert (comparison.better, comparison.worse, comparison.count) == (2, 1, 4)
    assert comparison.gain == pytest.approx((1 - 0.2 + 0.4) / 4)
    assert comparison.low <= comparison.gain <= comparison.high


def test_a_policy_compared_with_itself_gains_exactly_nothing(heldout, evaluated):
    comparison = compare(heldout.tasks, evaluated, evaluated)
    assert (comparison.gain, comparison.low, comparison.high) == (0, 0, 0)
    assert not comparison.differences


def test_policies_without_a_common_task_with_rewards_are_not_compared():
    tasks = [Task(id="0", prompt="p"), Task(id="1", prompt="q")]
    with pytest.raises(ConfigError, match="nothing to compare"):
        compare(tasks, evaluation([None, 1]), evaluation([1, None]))


def test_the_interval_holds_the_true_gain_in_about_95_of_100_experiments():
    random = np.random.default_rng(1)
    held = 0
    for _ in range(40):
        # Mean 0.1: of ten tasks, two are gained and one is lost.
        gains = random.choice([1, -1, 0], p=[0.2, 0.1, 0.7], size=200)
        low, high = bootstrap_interval(gains.tolist())
        held += low <= 0.1 <= high
    assert 35 <= held <= 40


@pytest.mark.slow
def test_the_interval_is_that_of_the_normal_approximation_where_tasks_are_many():
    gains = np.random.default_rng(2).normal(0.2, 1, size=400)
    low, high = bootstrap_interval(gains.tolist())
    error = 1.96 * gains.std() / len(gains) ** 0.5
    assert low == pytest.approx(gains.mean() - error, abs=0.01)
    assert high == pytest.approx(gains.mean() + error, abs=0.01)


def test_few_held_out_tasks_are_noted_with_the_error_that_they_leave():
    few, equal, enough = (MeanReward.of(r) for r in ([0.0, 1.0] * 10, [1.0] * 20, [0.0, 1.0] * 25))
    assert few.few_tasks_note(has_more=True).startswith("Only 20 tasks are measured.")
    one = replace(few, count=1)
    assert one.few_tasks_note(has_more=True).startswith("Only 1 task is measured.")
    assert "is 0.112, so a gain below about 0.22 may be chance" in few.few_tasks_note(has_more=True)
    assert "cannot be told, because all rewards are equal" in equal.few_tasks_note(has_more=True)
    assert "at least 50: raise --count, or add rows. Of" in few.few_tasks_note(has_more=True)
    assert "--count" not in few.few_tasks_note(has_more=False)
    assert enough.few_tasks_note(has_more=True) == ""

"""Advantages of any rewards that a reward function may return."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.strategies import examples
from textpolicy.algorithms import get, names
from textpolicy.rewards.returned_numbers import MAX_REWARD
from textpolicy.training.advantages import requested_keywords

# One algorithm for each function, because many share GRPO's. DPO takes pairs only, and distillation
# does not look at rewards.
OTHERS = {"dpo", "distillation"}
FUNCTIONS = {get(name).compute_advantages: name for name in reversed(names())}
ALL = sorted(set(FUNCTIONS.values()) - OTHERS)
# These look at other groups too.
BY_GROUP = sorted(set(ALL) - {"gdpo", "lite_ppo", "reinforce_pp", "reinforce_pp_baseline"})
STANDARDISED = ["grpo"]
CENTERED = ["dr_grpo", "rloo"]


def tables(values: st.SearchStrategy[float]) -> st.SearchStrategy[np.ndarray]:
    """Groups of one size; the values of one group are often equal."""
    shape = st.tuples(st.integers(1, 4), st.integers(2, 6))

    def of(size: tuple[int, int]) -> st.SearchStrategy[np.ndarray]:
        line = st.lists(values, min_size=size[1], max_size=size[1])
        equal = values.map(lambda value: [value] * size[1])
        rows = st.lists(line | equal, min_size=size[0], max_size=size[0])
        return rows.map(lambda table: np.array(table, np.float32))

    return shape.flatmap(of)


LARGEST = float(np.float32(MAX_REWARD))
BOUNDED = st.floats(-LARGEST, LARGEST, width=32)
USUAL = st.sampled_from([0.0, 1.0, -1.0, 0.5, 0.1, 1e-3])
MISSING = st.just(float("nan"))
REWARDS = tables(BOUNDED | USUAL | MISSING)
WHOLE = tables(st.integers(-1000, 1000).map(float) | MISSING) | tables(st.sampled_from([0.0, 1.0]))


def advantages(name: str, rewards: np.ndarray) -> np.ndarray:
    """Return the advantages; all completions have three tokens, and there is one reward."""
    function = get(name).compute_advantages
    given_rewards = mx.array(rewards)
    offered = {"lengths": mx.full(rewards.shape, 3.0), "parts": {"one": given_rewards}}
    wanted = {key: offered[key] for key in requested_keywords(function)}
    return np.array(function(given_rewards, **wanted))


def allowed(name: str, rewards: np.ndarray) -> np.ndarray:
    """MaxRL promises nothing for rewards below 0."""
    return np.abs(rewards) if name == "maxrl" else rewards


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    """Assert that both agree to float32's precision of the group's largest value."""
    scale = np.abs(expected).max(axis=-1, keepdims=True)
    assert (np.abs(found - expected) <= 1e-4 * scale + 1e-30).all(), (found, expected)


@pytest.mark.parametrize("name", ALL)
@given(rewards=REWARDS)
def test_no_finite_reward_makes_an_advantage_that_is_not_finite(name, rewards):
    found = advantages(name, allowed(name, rewards))
    assert found.shape == rewards.shape
    assert np.isfinite(found).all()
    assert not found[np.isnan(rewards)].any()


@pytest.mark.parametrize("name", BY_GROUP)
@given(rewards=REWARDS)
@examples(0.5)
def test_groups_do_not_leak_into_each_other(name, rewards):
    rewards = allowed(name, rewards)
    together = advantages(name, rewards)
    alone = [advantages(name, rewards[g : g + 1])[0] for g in range(len(rewards))]
    assert np.array_equal(together, alone)


@pytest.mark.parametrize("name", ALL)
@given(rewards=REWARDS, random=st.randoms(use_true_random=False))
@examples(0.5)
def test_a_permutation_of_a_group_permutes_its_advantages(name, rewards, random):
    rewards = allowed(name, rewards)
    order = list(range(rewards.shape[1]))
    random.shuffle(order)
    found, expected = advantages(name, rewards[:, order]), advantages(name, rewards)[:, order]
    # Rounding is of the size of a group's values, or of those of the batch.
    shape = rewards.shape if name in BY_GROUP else (1, -1)
    assert_close(found.reshape(shape), expected.reshape(shape))


@pytest.mark.parametrize("name", [*STANDARDISED, *CENTERED])
@given(rewards=WHOLE, shift=st.integers(-1000, 1000))
@examples(0.5)
def test_a_constant_added_to_the_rewards_of_a_group_changes_nothing(name, rewards, shift):
    assert_close(advantages(name, rewards + np.float32(shift)), advantages(name, rewards))


@pytest.mark.parametrize("name", [*STANDARDISED, *CENTERED])
@given(rewards=WHOLE, power=st.integers(0, 10))
@examples(0.5)
def test_the_scale_of_rewards_matters_only_without_a_standard_deviation(name, rewards, power):
    scale = np.float32(2**power)
    found, expected = advantages(name, rewards * scale), advantages(name, rewards)
    if name in CENTERED:
        assert np.array_equal(found, expected * scale)
    else:
        # The eps beside a standard deviation of about 0.4 or more.
        assert np.allclose(found, expected, rtol=5e-4, atol=1e-6)


@pytest.mark.parametrize("name", [*STANDARDISED, *CENTERED])
@given(rewards=REWARDS)
@examples(0.5)
def test_the_advantages_of_a_group_sum_to_zero_and_keep_the_order_of_rewards(name, rewards):
    for line, found in zip(rewards, advantages(name, rewards), strict=True):
        assert abs(found.sum()) <= 1e-5 * np.abs(found).sum() + 1e-30
        known = ~np.isnan(line)
        by_reward = found[known][np.argsort(line[known], kind="stable")]
        assert (np.diff(by_reward) >= 0).all()


@pytest.mark.parametrize("name", ALL)
@given(value=BOUNDED | USUAL, missing=st.integers(0, 4), groups=st.integers(1, 3))
@examples(0.3)
def test_equal_rewards_give_exact_zeros(name, value, missing, groups):
    line = [value] * 5
    line[:missing] = [float("nan")] * missing
    rewards = allowed(name, np.array([line] * groups, np.float32))
    assert not advantages(name, rewards).any()


@pytest.mark.parametrize("name", BY_GROUP)
@given(rewards=REWARDS)
@examples(0.5)
def test_a_rollout_without_a_reward_counts_for_nothing(name, rewards):
    line = allowed(name, rewards)[0]
    known = ~np.isnan(line)
    assume(known.sum() >= 2)
    found = advantages(name, line[None])[:, known]
    assert_close(found, advantages(name, line[None, known]))

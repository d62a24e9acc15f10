"""Metrics of rollouts: rewards, shares of groups, lengths. Their names are in docs/metrics.md."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from textpolicy.types import Metrics, Rollout, RolloutGroup, StopReason

# Most rewards give 0 to a wrong answer and 1 to a right one.
_GOOD_REWARD = 0.5


def rollout_metrics(groups: Sequence[RolloutGroup]) -> Metrics:
    """Return means over rollouts with a reward, and over groups. Lengths count sampled tokens."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    rewards_G = [
        [rollout.reward for rollout in group.rollouts if rollout.reward is not None]
        for group in groups
    ]
    return (
        _reward_metrics(rewards_G)
        | _reward_function_metrics(rollouts)
        | _length_metrics(rollouts)
        | {
            "reward/errors": float(np.mean([rollout.error is not None for rollout in rollouts])),
            "reward/unscored": 1 - sum(map(len, rewards_G)) / len(rollouts),
        }
    )


def staleness_metrics(groups: Sequence[RolloutGroup], version: int) -> Metrics:
    """Return how many versions groups and tokens are behind the weights `version` that train.

    A group is as old as its oldest token. A mixed rollout has tokens of several versions.
    """
    ages = [version - group.version for group in groups]
    tokens_R = [rollout.sampled_by_version for group in groups for rollout in group.rollouts]
    tokens = sum(tokens_R, Counter[int]())
    behind = sum((version - sampled_by) * number for sampled_by, number in tokens.items())
    mixed = sum(of_rollout.total() for of_rollout in tokens_R if len(of_rollout) > 1)
    return {
        "staleness/mean": float(np.mean(ages)),
        "staleness/max": float(max(ages)),
        "staleness/token_mean": behind / max(1, tokens.total()),
        "staleness/mixed_tokens": mixed / max(1, tokens.total()),
    }


def _reward_metrics(rewards_G: Sequence[Sequence[float]]) -> Metrics:
    """Return no metrics if there is no reward, because a mean of no rewards is not a number."""
    scored = [rewards for rewards in rewards_G if rewards]
    if not scored:
        return {}
    equal = [rewards[0] for rewards in scored if np.ptp(rewards) == 0]
    good = sum(reward >= _GOOD_REWARD for reward in equal)
    return {
        "reward": float(np.concatenate(scored).mean()),
        "reward_std": float(np.mean([np.std(rewards) for rewards in scored])),
        "frac_reward_zero_std": len(equal) / len(scored),
        "frac_all_good": good / len(scored),
        "frac_all_bad": (len(equal) - good) / len(scored),
        "frac_mixed": 1 - len(equal) / len(scored),
    }


def _length_metrics(rollouts: Sequence[Rollout]) -> Metrics:
    lengths = [rollout.sampled for rollout in rollouts]
    cut = [rollout.stop_reason is StopReason.LENGTH for rollout in rollouts]
    ended = [length for length, is_cut in zip(lengths, cut, strict=True) if not is_cut]
    metrics = _length_spread(lengths, "length")
    metrics["completions/clipped_ratio"] = float(np.mean(cut))
    metrics["num_tokens"] = float(sum(lengths))
    return metrics | _length_spread(ended, "terminated_length")


def _length_spread(lengths: Sequence[int], name: str) -> Metrics:
    if not lengths:
        return {}
    return {
        f"completions/mean_{name}": float(np.mean(lengths)),
        f"completions/min_{name}": float(min(lengths)),
        f"completions/max_{name}": float(max(lengths)),
    }


def _reward_function_metrics(rollouts: Sequence[Rollout]) -> Metrics:
    """Return mean and spread of each reward function, and means of the other reported numbers."""
    metrics: Metrics = {}
    for name, values in _by_name([rollout.rewards for rollout in rollouts]).items():
        metrics[f"rewards/{name}/mean"] = float(np.mean(values))
        metrics[f"rewards/{name}/std"] = float(np.std(values))
    for name, values in _by_name([rollout.metrics for rollout in rollouts]).items():
        metrics[name] = float(np.mean(values))
    return metrics


def _by_name(numbers: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Return the values of each name, from the rollouts that have one."""
    names = dict.fromkeys(name for mapping in numbers for name in mapping)
    return {name: [mapping[name] for mapping in numbers if name in mapping] for name in names}

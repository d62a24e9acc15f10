"""What rollouts say about a run: rewards, useless groups, lengths. Names are in docs/metrics.md."""

from collections.abc import Mapping, Sequence

import numpy as np

from textpolicy.types import Metrics, Rollout, RolloutGroup, StopReason

# Between 0, all that most rewards give to a wrong answer, and 1, what they give to a right one.
_GOOD = 0.5


def rollout_metrics(groups: Sequence[RolloutGroup]) -> Metrics:
    """Means over scored rollouts and over groups. Lengths count sampled tokens."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    rewards_G = [
        [rollout.reward for rollout in group.rollouts if rollout.reward is not None]
        for group in groups
    ]
    return (
        _reward_metrics(rewards_G)
        | _part_metrics(rollouts)
        | _length_metrics(rollouts)
        | {
            "reward/errors": float(np.mean([rollout.error is not None for rollout in rollouts])),
            "reward/unscored": 1 - sum(map(len, rewards_G)) / len(rollouts),
        }
    )


def staleness_metrics(groups: Sequence[RolloutGroup], version: int) -> Metrics:
    """By how many versions these groups are older than the weights that now learn from them."""
    ages = [version - group.version for group in groups]
    return {"staleness/mean": float(np.mean(ages)), "staleness/max": float(max(ages))}


def _reward_metrics(rewards_G: Sequence[Sequence[float]]) -> Metrics:
    """Nothing, where nothing was scored: a mean of no rewards is no number."""
    scored = [rewards for rewards in rewards_G if rewards]
    if not scored:
        return {}
    equal = [rewards[0] for rewards in scored if np.ptp(rewards) == 0]
    good = sum(reward >= _GOOD for reward in equal)
    return {
        "reward": float(np.concatenate(scored).mean()),
        "reward_std": float(np.mean([np.std(rewards) for rewards in scored])),
        "frac_reward_zero_std": len(equal) / len(scored),
        "frac_all_good": good / len(scored),
        "frac_all_bad": (len(equal) - good) / len(scored),
        "frac_mixed": 1 - len(equal) / len(scored),
    }


def _length_metrics(rollouts: Sequence[Rollout]) -> Metrics:
    lengths = [sum(rollout.mask) for rollout in rollouts]
    cut = [rollout.stop_reason is StopReason.LENGTH for rollout in rollouts]
    ended = [length for length, is_cut in zip(lengths, cut, strict=True) if not is_cut]
    metrics = {
        "completions/mean_length": float(np.mean(lengths)),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": float(np.mean(cut)),
        "num_tokens": float(sum(lengths)),
    }
    if ended:
        metrics["completions/mean_terminated_length"] = float(np.mean(ended))
        metrics["completions/min_terminated_length"] = float(min(ended))
        metrics["completions/max_terminated_length"] = float(max(ended))
    return metrics


def _part_metrics(rollouts: Sequence[Rollout]) -> Metrics:
    """Each reward function's own mean and spread, and the means of what else was reported."""
    metrics: Metrics = {}
    for name, values in _by_name([rollout.rewards for rollout in rollouts]).items():
        metrics[f"rewards/{name}/mean"] = float(np.mean(values))
        metrics[f"rewards/{name}/std"] = float(np.std(values))
    for name, values in _by_name([rollout.metrics for rollout in rollouts]).items():
        metrics[name] = float(np.mean(values))
    return metrics


def _by_name(numbers: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Each name's values, of the rollouts that have one."""
    names = dict.fromkeys(name for mapping in numbers for name in mapping)
    return {name: [mapping[name] for mapping in numbers if name in mapping] for name in names}

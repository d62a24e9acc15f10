"""What rollouts say about a run: rewards, useless groups, lengths. Names are in docs/metrics.md."""

from collections.abc import Sequence

import numpy as np

from textpolicy.types import Metrics, RolloutGroup, StopReason


def rollout_metrics(groups: Sequence[RolloutGroup]) -> Metrics:
    """Means over scored rollouts and over groups. Lengths count sampled tokens."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    rewards_G = [
        [rollout.reward for rollout in group.rollouts if rollout.reward is not None]
        for group in groups
    ]
    lengths = [sum(rollout.mask) for rollout in rollouts]
    return _reward_metrics(rewards_G) | {
        "reward/unscored": 1 - sum(map(len, rewards_G)) / len(rollouts),
        "completions/mean_length": float(np.mean(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": float(
            np.mean([rollout.stop_reason is StopReason.LENGTH for rollout in rollouts])
        ),
        "num_tokens": float(sum(lengths)),
    }


def _reward_metrics(rewards_G: Sequence[Sequence[float]]) -> Metrics:
    """Nothing, where nothing was scored: a mean of no rewards is no number."""
    scored = [rewards for rewards in rewards_G if rewards]
    if not scored:
        return {}
    return {
        "reward": float(np.concatenate(scored).mean()),
        "reward_std": float(np.mean([np.std(rewards) for rewards in scored])),
        "frac_reward_zero_std": float(np.mean([np.ptp(rewards) == 0 for rewards in scored])),
    }

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
    scored = [rewards for rewards in rewards_G if rewards]
    if not scored:
        return {"reward/unscored": 1.0}
    lengths = [sum(rollout.mask) for rollout in rollouts]
    flat = np.concatenate(scored)
    return {
        "reward": float(flat.mean()),
        "reward_std": float(np.mean([np.std(rewards) for rewards in scored])),
        "reward/unscored": 1 - len(flat) / len(rollouts),
        "frac_reward_zero_std": float(np.mean([np.ptp(rewards) == 0 for rewards in scored])),
        "completions/mean_length": float(np.mean(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": float(
            np.mean([rollout.stop_reason is StopReason.LENGTH for rollout in rollouts])
        ),
        "num_tokens": float(sum(lengths)),
    }

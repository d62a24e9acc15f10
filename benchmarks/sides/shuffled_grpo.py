"""GRPO on rewards that are dealt to the wrong rollouts: the control of real_learning.py."""

from functools import cache

import mlx.core as mx
from learning import with_shuffled_rewards

from textpolicy.algorithms import grpo
from textpolicy.types import AdvantageFn


@cache
def _shuffled(seed: int) -> AdvantageFn:
    return with_shuffled_rewards(grpo.compute_advantages, seed)


def compute_advantages(rewards: mx.array, *, seed: int) -> mx.array:
    """Return the advantages of GRPO after the rewards of the whole step were shuffled."""
    return _shuffled(seed)(rewards)

"""A penalty for completions near the length limit: DAPO, arXiv:2503.14476, section 3.4.

penalty = 0                                 |o| <= max_tokens - cache sampled tokens
          (max_tokens - cache - |o|)/cache  up to max_tokens
          -1                                beyond
"""

from collections.abc import Callable

import mlx.core as mx
from jaxtyping import Float

from textpolicy.algorithms.parts.reductions import GroupRewards
from textpolicy.errors import ConfigError


def soft_overlong_punishment(
    lengths: Float[mx.array, "*groups group"], *, max_tokens: int, cache: int
) -> GroupRewards:
    """Return a number from 0 to -1 for each length; it falls over the last `cache` tokens."""
    if not 0 < cache <= max_tokens:
        raise ConfigError(f"cache is {cache}; expected at least 1 and at most max_tokens")
    return mx.clip((max_tokens - cache - lengths) / cache, -1, 0)


def with_penalty(
    advantage_fn: Callable[[GroupRewards], GroupRewards], *, max_tokens: int, cache: int
) -> Callable[..., GroupRewards]:
    """Return an advantage function that adds the penalty to the rewards first."""

    def compute_advantages(rewards: GroupRewards, *, lengths: GroupRewards) -> GroupRewards:
        penalty = soft_overlong_punishment(lengths, max_tokens=max_tokens, cache=cache)
        return advantage_fn(rewards + penalty)

    return compute_advantages

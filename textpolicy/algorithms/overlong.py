"""A reward for stopping in time: DAPO, arXiv:2503.14476, section 3.4, soft overlong punishment.

    penalty = 0                                 |o| <= max_tokens - cache
              (max_tokens - cache - |o|)/cache  up to max_tokens
              -1                                beyond

Lengths are counted in sampled tokens.
"""

from collections.abc import Callable

import mlx.core as mx
from jaxtyping import Float

from textpolicy.algorithms.ops import Rewards
from textpolicy.errors import ConfigError


def overlong_penalty(
    lengths: Float[mx.array, "*groups group"], *, max_tokens: int, cache: int
) -> Rewards:
    """Between 0 and -1 for each length, falling over the last `cache` tokens."""
    if not 0 < cache <= max_tokens:
        raise ConfigError(f"cache is {cache}; expected at least 1 and at most max_tokens")
    return mx.clip((max_tokens - cache - lengths) / cache, -1, 0)


def with_penalty(
    advantage_fn: Callable[[Rewards], Rewards], *, max_tokens: int, cache: int
) -> Callable[..., Rewards]:
    """The same advantages, of rewards that the penalty was added to."""

    def compute_advantages(rewards: Rewards, *, lengths: Rewards) -> Rewards:
        penalty = overlong_penalty(lengths, max_tokens=max_tokens, cache=cache)
        return advantage_fn(rewards + penalty)

    return compute_advantages

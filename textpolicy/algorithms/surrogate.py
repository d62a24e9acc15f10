"""The clipped objective of PPO: Schulman et al. 2017, arXiv:1707.06347, equation 7.

    ratio_t = exp(logp_t - logp_old_t)
    L_t = min(ratio_t A_t, clip(ratio_t, 1 - clip_low, 1 + clip_high) A_t)

Algorithms differ in where A comes from and in how tokens are averaged.
"""

import mlx.core as mx
from jaxtyping import Float

from textpolicy.algorithms.ops import masked_sum
from textpolicy.types import Batch


def clipped_surrogate(
    logp: Float[mx.array, "batch time"], batch: Batch, *, clip_low: float, clip_high: float
) -> tuple[Float[mx.array, "batch time"], dict[str, mx.array]]:
    """L for each token, and the shares of tokens at which a clip stops the gradient."""
    ratio = mx.exp(mx.where(batch.mask, logp - batch.logp_old, 0))
    clipped = mx.clip(ratio, 1 - clip_low, 1 + clip_high)
    surrogate = mx.minimum(ratio * batch.advantages, clipped * batch.advantages)
    low = (ratio < 1 - clip_low) & (batch.advantages < 0)
    high = (ratio > 1 + clip_high) & (batch.advantages > 0)
    shares = {
        "clip_ratio/low_mean": low,
        "clip_ratio/high_mean": high,
        "clip_ratio/region_mean": low | high,
    }
    return surrogate, {
        name: masked_sum(share.astype(mx.float32), batch.mask) / batch.token_count
        for name, share in shares.items()
    }

"""Token weights: factors on each token's loss that have no gradient, for the option `weights`.

Corrections for a sampler whose probabilities differ from the trainer's old log-probabilities. rho
is 1 unless the trainer computes fresh ones, because recorded ones are the sampler's own.

    rho_t = p_old(token) / p_sampled(token), or the product over a sequence
    truncate    min(rho, cap): truncated importance sampling (TIS), Yao et al. 2025, Your Efficient
                RL Framework Secretly Brings You Off-Policy RL Training
    mask        rho inside [low, high], 0 outside (IcePop; masked importance sampling)

`off_policy_mask` is off-policy sequence masking (OPSM): DeepSeek-V3.2, arXiv:2512.02556, eq. 9.
`top_entropy_tokens` is Beyond the 80/20 Rule: Wang et al. 2025, arXiv:2506.01939.
"""

import mlx.core as mx
from jaxtyping import Float

from textpolicy.algorithms.parts.ratio_levels import TOKEN, WHOLE_SEQUENCE, RatioLevel
from textpolicy.algorithms.parts.reductions import PerToken, flagged_share, quantile, sequence_means
from textpolicy.errors import ConfigError
from textpolicy.types import Batch

LogProbs = Float[mx.array, "batch time"]
Weighted = tuple[PerToken, dict[str, mx.array]]
"""The factor of each token, and metrics."""

# Tokens after the same text have the same entropy up to rounding, and are kept or dropped together.
_ENTROPY_ROUNDING = 1e-4


def truncate_tokens(logp: LogProbs, batch: Batch, *, cap: float = 2.0) -> Weighted:
    """Return each token's rho = p_old / p_sampled, at most `cap`."""
    return _truncate(TOKEN, cap, batch)


def truncate_sequences(logp: LogProbs, batch: Batch, *, cap: float = 3.0) -> Weighted:
    """Return each sequence's product of rho, at most `cap`."""
    return _truncate(WHOLE_SEQUENCE, cap, batch)


def mask_tokens(logp: LogProbs, batch: Batch, *, low: float = 0.5, high: float = 5.0) -> Weighted:
    """Return each token's rho, or 0 where rho is outside [low, high]."""
    return _mask(TOKEN, low, high, batch)


def mask_sequences(
    logp: LogProbs, batch: Batch, *, low: float = 0.0, high: float = 3.0
) -> Weighted:
    """Return each sequence's product of rho, or 0 where the product is outside [low, high]."""
    return _mask(WHOLE_SEQUENCE, low, high, batch)


def off_policy_mask(logp: LogProbs, batch: Batch, *, threshold: float = 0.5) -> Weighted:
    """Return 0 for sequences with a negative advantage and a fallen probability, else 1.

    The probability has fallen if the mean over the sequence's tokens of log p_sampled - log p is
    above `threshold`, in nats.
    """
    distance = sequence_means(batch.logp_sampled - logp, batch)[:, None]
    keep = (batch.advantages >= 0) | (distance <= threshold)
    dropped = flagged_share(~keep, batch, True)
    return keep.astype(mx.float32), {"off_policy_masked": dropped}


def top_entropy_tokens(logp: LogProbs, batch: Batch, *, fraction: float = 0.2) -> Weighted:
    """Return 1 for the `fraction` of the batch's tokens with the highest entropy, else 0.

    The threshold is one of the whole optimizer batch. Averages still divide by all tokens.
    """
    if not 0 < fraction <= 1:
        raise ConfigError(f"fraction of top_entropy_tokens is {fraction}; expected above 0 to 1")
    if batch.entropies is None or batch.entropy is None:
        raise ConfigError(
            "top_entropy_tokens needs the entropies of the whole batch, and the trainer did not "
            "compute them; use Trainer(..., old_logprobs='fresh') or --old-logprobs fresh"
        )
    threshold = quantile(batch.entropies, 1 - fraction)
    chosen = batch.entropy >= threshold - _ENTROPY_ROUNDING
    return chosen.astype(mx.float32), {"entropy_threshold/max": threshold}


def _truncate(level: RatioLevel, cap: float, batch: Batch) -> Weighted:
    rho = mx.exp(level(batch.logp_old - batch.logp_sampled, batch))
    truncated = flagged_share(rho > cap, batch, level.by_sequence)
    return mx.minimum(rho, cap), {"sampling/truncated": truncated}


def _mask(level: RatioLevel, low: float, high: float, batch: Batch) -> Weighted:
    rho = mx.exp(level(batch.logp_old - batch.logp_sampled, batch))
    outside = (rho < low) | (rho > high)
    masked = flagged_share(outside, batch, level.by_sequence)
    return mx.where(outside, 0, rho), {"sampling/masked": masked}

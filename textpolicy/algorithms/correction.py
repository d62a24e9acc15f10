"""Corrections for a sampler that is not quite the policy which ratios are taken against.

    rho_t = p_old(token) / p_sampled(token), or the product over a sequence

    truncate    min(rho, cap): Yao et al. 2025, Your Efficient RL Framework Secretly Brings You
                Off-Policy RL Training (truncated importance sampling)
    mask        rho inside [low, high], 0 outside (IcePop; masked importance sampling)

They matter where the old log-probabilities were computed afresh by other kernels, precision or
weights than sampled; with recorded ones every rho is 1. `off_policy_mask` drops sequences instead:
DeepSeek-V3.2, arXiv:2512.02556, equation 9. All are for the `weights` of a policy loss.
"""

import mlx.core as mx
from jaxtyping import Float

from textpolicy.algorithms.objective import TokenWeight
from textpolicy.algorithms.ops import PerToken, row_means
from textpolicy.algorithms.ratios import Ratio
from textpolicy.algorithms.surrogate import share
from textpolicy.types import Batch

Weighted = tuple[PerToken, dict[str, mx.array]]


def truncate_tokens(cap: float = 2.0) -> TokenWeight:
    """Each token's rho, at most `cap`."""
    return lambda logp, batch: _truncated(_token_log_rho(batch), cap, batch)


def truncate_sequences(cap: float = 3.0) -> TokenWeight:
    """Each sequence's rho, at most `cap`."""
    return lambda logp, batch: _truncated(_sequence_log_rho(batch), cap, batch)


def mask_tokens(low: float = 0.5, high: float = 5.0) -> TokenWeight:
    """Each token's rho; 0 for tokens outside [low, high]."""
    return lambda logp, batch: _masked(_token_log_rho(batch), low, high, batch)


def mask_sequences(low: float = 0.0, high: float = 3.0) -> TokenWeight:
    """Each sequence's rho; 0 for sequences outside [low, high]."""
    return lambda logp, batch: _masked(_sequence_log_rho(batch), low, high, batch)


def off_policy_mask(threshold: float = 0.5) -> TokenWeight:
    """0 for sequences with a negative advantage that the policy has moved away from, else 1.

    The distance is the mean over tokens of log p_sampled - log p, in nats.
    """

    def weight(logp: Float[mx.array, "batch time"], batch: Batch) -> Weighted:
        distance = row_means(batch.logp_sampled - logp, batch.mask)[:, None]
        keep = (batch.advantages >= 0) | (distance <= threshold)
        dropped = share(~keep, batch, by_sequence=True)
        return keep.astype(mx.float32), {"off_policy_masked": dropped}

    return weight


def _token_log_rho(batch: Batch) -> Ratio:
    return Ratio(_log_rhos(batch), by_sequence=False)


def _sequence_log_rho(batch: Batch) -> Ratio:
    return Ratio(_log_rhos(batch).sum(axis=1, keepdims=True), by_sequence=True)


def _log_rhos(batch: Batch) -> Float[mx.array, "batch time"]:
    return mx.where(batch.mask, batch.logp_old - batch.logp_sampled, 0)


def _truncated(log_rho: Ratio, cap: float, batch: Batch) -> Weighted:
    rho = mx.exp(log_rho.logs)
    changed = share(rho > cap, batch, by_sequence=log_rho.by_sequence)
    return mx.minimum(rho, cap), {"sampling/truncated": changed}


def _masked(log_rho: Ratio, low: float, high: float, batch: Batch) -> Weighted:
    rho = mx.exp(log_rho.logs)
    outside = (rho < low) | (rho > high)
    changed = share(outside, batch, by_sequence=log_rho.by_sequence)
    return mx.where(outside, 0, rho), {"sampling/masked": changed}

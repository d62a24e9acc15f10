"""Sums, means, shares and quantiles of values of tokens."""

import mlx.core as mx
from jaxtyping import Bool, Float

from textpolicy.types import Batch

PerToken = Float[mx.array, "batch _"]
"""One value for each token, or one for each row that holds for all tokens of the row."""


def masked_sum(x: PerToken, mask: Bool[mx.array, "batch time"]) -> Float[mx.array, ""]:
    """Return the sum over counted tokens. Values outside the mask may be NaN."""
    return mx.where(mask, x, 0).sum()


def row_means(x: PerToken, mask: Bool[mx.array, "batch time"]) -> Float[mx.array, " batch"]:
    """Return each row's mean over its counted tokens; 0 for a row without any."""
    return mx.where(mask, x, 0).sum(axis=1) / mx.maximum(mask.sum(axis=1), 1)


def flagged_share(
    flags: Bool[mx.array, "batch _"], batch: Batch, by_sequence: bool
) -> Float[mx.array, ""]:
    """Return the share of the batch's tokens that are flagged, or of its sequences."""
    flagged = flags.astype(mx.float32)
    if by_sequence:
        return row_means(flagged, batch.mask).sum() / batch.rows
    return masked_sum(flagged, batch.mask) / batch.token_count


def quantile(values: Float[mx.array, " values"], at: float) -> Float[mx.array, ""]:
    """Return the value below which a share `at` of the values lies, interpolated linearly."""
    ordered = mx.sort(values)
    place = at * (len(values) - 1)
    low = int(place)
    high = min(low + 1, len(values) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])

"""Learning from uncertain tokens only: Wang et al. 2025, Beyond the 80/20 Rule, arXiv:2506.01939.

    J with every token but the `fraction` of highest entropy left out

Most tokens of an answer follow from those before; the few at which it forks carry the learning. The
threshold is that of the whole optimizer batch.
"""

import mlx.core as mx
from jaxtyping import Float

from textpolicy.algorithms.objective import TokenWeight
from textpolicy.errors import ConfigError
from textpolicy.types import Batch

# Tokens after the same text have the same entropy, up to how it was rounded among other rows. All
# of them are chosen, or none.
_ROUNDING = 1e-4


def top_entropy_tokens(fraction: float = 0.2) -> TokenWeight:
    """1 for the batch's most uncertain tokens, 0 for the rest; for the `weights` of a policy loss.

    Denominators stay those of all tokens.
    """
    if not 0 < fraction <= 1:
        raise ConfigError(f"fraction is {fraction}; expected a number in (0, 1]")

    def weight(
        logp: Float[mx.array, "batch time"], batch: Batch
    ) -> tuple[Float[mx.array, "batch time"], dict[str, mx.array]]:
        if batch.entropies is None or batch.entropy is None:
            raise ConfigError(
                "top_entropy_tokens compares with the whole batch, whose entropies nobody "
                "computed: use Trainer(..., old_logprobs='fresh')"
            )
        threshold = quantile(batch.entropies, 1 - fraction)
        chosen = batch.entropy >= threshold - _ROUNDING
        return chosen.astype(mx.float32), {"entropy_threshold/max": threshold}

    return weight


def quantile(values: Float[mx.array, " values"], at: float) -> Float[mx.array, ""]:
    """The value below which a share `at` of the values lies, interpolated linearly."""
    ordered = mx.sort(values)
    place = at * (len(values) - 1)
    low = int(place)
    high = min(low + 1, len(values) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])

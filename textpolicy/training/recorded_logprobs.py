"""Log-probabilities that are computed once, before the first update on a batch."""

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np

from textpolicy.training.batch import Row, Whole, micro_batches, pad
from textpolicy.training.logprobs import Reader


def scored(
    rows: Sequence[Row], policy: Reader | None, reference: Reader | None, size: int | None
) -> list[Row]:
    """The rows with what the policy and the reference, where given, say of their tokens."""
    done: list[Row] = []
    share = all(reader.share_prompts for reader in (policy, reference) if reader)
    for part in micro_batches(rows, size, share_prompts=share):
        # Silent rows give no gradient, but their divergence from the reference counts.
        batch = pad([replace(row, silent=False) for row in part], Whole.of(part))
        known: dict[str, np.ndarray] = {}
        if policy:
            logp, entropy = policy(batch, differentiable=False)
            mx.eval(logp, entropy)
            known |= {"logp_old": np.array(logp), "entropies": np.array(entropy)}
        if reference:
            known["logp_ref"] = np.array(reference(batch, differentiable=False)[0])
        for place, row in enumerate(part):
            own = {name: array[place, : len(row.mask)] for name, array in known.items()}
            done.append(replace(row, **own))
    return done

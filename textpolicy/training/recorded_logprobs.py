"""Log-probabilities that are computed once, before the first update on a batch."""

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np

from textpolicy.training.batch import BatchTotals, TrainingRow, make_batch, split_into_micro_batches
from textpolicy.training.logprobs import ModelLogprobs


def add_logprobs(
    rows: Sequence[TrainingRow],
    policy: ModelLogprobs | None,
    reference: ModelLogprobs | None,
    size: int | None,
) -> list[TrainingRow]:
    """The rows with what the policy and the reference, where given, say of their tokens."""
    done: list[TrainingRow] = []
    share = all(reader.share_prompts for reader in (policy, reference) if reader)
    for part in split_into_micro_batches(rows, size, share_prompts=share):
        # Silent rows give no gradient, but their divergence from the reference counts.
        batch = make_batch([replace(row, silent=False) for row in part], BatchTotals.of(part))
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

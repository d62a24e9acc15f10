"""Log-probabilities that are computed once, before the first update on a batch."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np

from textpolicy.training.batch import Row, Whole, micro_batches, pad
from textpolicy.training.logprobs import Scores
from textpolicy.types import Batch

Read = Callable[[Batch], Scores]


def scored(
    rows: Sequence[Row], policy: Read | None, reference: Read | None, size: int | None
) -> list[Row]:
    """The rows with what the policy and the reference, where given, say of their tokens."""
    done: list[Row] = []
    for part in micro_batches(rows, size):
        # Silent rows give no gradient, but their divergence from the reference counts.
        batch = pad([replace(row, silent=False) for row in part], Whole.of(part))
        known: dict[str, np.ndarray] = {}
        if policy:
            known["logp_old"], known["entropies"] = _evaluated(policy(batch))
        if reference:
            known["logp_ref"], _ = _evaluated(reference(batch))
        for place, row in enumerate(part):
            own = {name: array[place, : len(row.mask)] for name, array in known.items()}
            done.append(replace(row, **own))
    return done


def _evaluated(scores: Scores) -> tuple[np.ndarray, np.ndarray]:
    mx.eval(scores)
    logp, entropy = scores
    return np.array(logp), np.array(entropy)

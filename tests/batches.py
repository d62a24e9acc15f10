"""Batches for the tests of losses, without a model."""

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from textpolicy.types import Batch


def batch_of(mask: Any, logp_old: Any, advantages: Any, **changes: Any) -> Batch:
    """Return a batch of one prompt's rows, with one advantage for each row."""
    mask = mx.array(mask, dtype=mx.bool_)
    rows, time = mask.shape
    old = mx.array(logp_old, dtype=mx.float32)
    fields = {
        "prompts": mx.zeros((1, 1), dtype=mx.int32),
        "prompt_lengths": mx.ones(1, dtype=mx.int32),
        "owner": mx.zeros(rows, dtype=mx.int32),
        "group": mx.zeros(rows, dtype=mx.int32),
        "tokens": mx.zeros((rows, time), dtype=mx.int32),
        "mask": mask,
        "logp_sampled": old,
        "logp_old": old,
        "advantages": mx.broadcast_to(mx.array(advantages, dtype=mx.float32)[:, None], mask.shape),
        "temperature": mx.ones(rows),
        "rows": rows,
        "token_count": int(mask.sum().item()),
        "max_tokens": time,
    }
    return Batch(**(fields | changes))


def random_case(
    seed: int = 0, rows: int = 4, time: int = 5, *, ragged: bool = True
) -> tuple[mx.array, Batch]:
    """Return current log-probabilities, and a batch with every field that a loss may read."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, time + 1, (rows, 1)) if ragged else np.full((rows, 1), time)
    mask = np.arange(time) < lengths
    old = random.normal(-1, 0.3, (rows, time))
    logp = mx.array(old + random.normal(0, 0.3, (rows, time)), dtype=mx.float32)
    entropy = mx.array(random.uniform(0, 2, (rows, time)), dtype=mx.float32)
    batch = batch_of(
        mask,
        old,
        random.normal(size=rows),
        logp_sampled=mx.array(old + random.normal(0, 0.1, (rows, time)), dtype=mx.float32),
        logp_ref=mx.array(old + random.normal(0, 0.2, (rows, time)), dtype=mx.float32),
        entropy=entropy,
        entropies=mx.array(np.array(entropy)[mask]),
        group=mx.arange(rows) // 2,
    )
    return logp, batch


def part_of(batch: Batch, rows: slice) -> Batch:
    """Return a micro-batch: some rows of the batch, with the totals of the whole batch."""
    arrays = ("owner", "group", "tokens", "mask", "logp_sampled", "logp_old", "logp_ref")
    arrays += ("entropy", "advantages", "temperature")
    present = {name: getattr(batch, name) for name in arrays}
    return replace(batch, **{n: x[rows] for n, x in present.items() if x is not None})

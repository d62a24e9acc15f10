"""Rollout groups of given lengths with random tokens, and their batches."""

import numpy as np

from tests.test_types import rollout
from textpolicy.training.batch import (
    BatchTotals,
    make_batch,
    split_into_micro_batches,
    training_rows,
)
from textpolicy.types import Batch, RolloutGroup, Sampling, Task

# The prompt length of each group, and the lengths of its completions.
RAGGED = [(9, [3, 7, 1]), (4, [2, 2, 5]), (1, [6, 4, 2])]


def groups_of(
    *shapes: tuple[int, list[int]], temperature: float = 1.0, vocabulary: int = 250
) -> list[RolloutGroup]:
    """Return a group for each shape: the prompt length, and the lengths of the completions."""
    random = np.random.default_rng(0)
    draw = lambda n: random.integers(0, vocabulary, n).tolist()  # noqa: E731
    groups = []
    for given, lengths in shapes:
        prompt = draw(given)
        members = [
            rollout(
                tokens=prompt + draw(drawn),
                mask=[False] * given + [True] * drawn,
                logprobs=[0.0] * given + [-1.0] * drawn,
                sampling=Sampling(temperature=temperature),
                reward=float(m),
            )
            for m, drawn in enumerate(lengths)
        ]
        groups.append(RolloutGroup(task=Task(id="t", prompt="p"), rollouts=members))
    return groups


def batches_of(groups: list[RolloutGroup], size: int | None = None) -> list[Batch]:
    """Return the micro-batches of one optimizer batch."""
    rows = training_rows(groups)
    return [make_batch(part, BatchTotals.of(rows)) for part in split_into_micro_batches(rows, size)]

"""Dealing the micro-batches of an optimizer batch to ranks."""

from collections.abc import Sequence
from dataclasses import dataclass

from textpolicy.device_sizes import device_sizes
from textpolicy.ranks import Ranks
from textpolicy.training.batch import (
    TrainingRow,
    count_padded_tokens,
    split_into_micro_batches,
)


@dataclass(frozen=True)
class DealtParts:
    """The micro-batches of an optimizer batch, and the rank that computes each of them."""

    parts: Sequence[Sequence[TrainingRow]]
    owners: Sequence[int]

    def of(self, rank: int) -> list[Sequence[TrainingRow]]:
        """Return the micro-batches of one rank, which may be none."""
        return [part for part, owner in zip(self.parts, self.owners, strict=True) if owner == rank]


def deal_micro_batches(
    rows: Sequence[TrainingRow], size: int | None, ranks: Ranks, *, share_prompts: bool = True
) -> DealtParts:
    """Return the micro-batches of the rows, dealt by their tokens. All ranks deal alike.

    `size` is the number of rows of a micro-batch, or None. With several ranks, micro-batches are
    cut small enough that each rank gets some, where the rows are enough.
    """
    tokens = device_sizes().micro_batch_tokens
    if ranks.size > 1:
        # Ranks may be on different machines.
        tokens = min(ranks.gather_json(tokens))
        padded = count_padded_tokens(rows, share_prompts=share_prompts)
        tokens = min(tokens, -(-padded // ranks.size))
        # Some losses compare two rows of a group.
        size = size and min(size, max(2, -(-len(rows) // ranks.size)))
    parts = split_into_micro_batches(rows, size, share_prompts=share_prompts, tokens=tokens)
    costs = [count_padded_tokens(part, share_prompts=share_prompts) for part in parts]
    return DealtParts(parts, deal_by_cost(costs, ranks.size))


def deal_by_cost(costs: Sequence[int], ranks: int) -> list[int]:
    """Return a rank for each cost: the largest first, each to the rank with the least so far."""
    sums = [0] * ranks
    owners = [0] * len(costs)
    for number in sorted(range(len(costs)), key=lambda n: -costs[n]):
        owner = sums.index(min(sums))
        owners[number] = owner
        sums[owner] += costs[number]
    return owners

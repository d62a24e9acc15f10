"""Batches of demonstrations as arrays, and the order in which demonstrations are learned."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from random import Random
from typing import cast

import mlx.core as mx
import numpy as np
from jaxtyping import Bool, Int

from textpolicy.errors import DataError, TrainingError
from textpolicy.training.sft.demonstrations import Demonstration, PackedRow
from textpolicy.training.sft.packing import pack_rows

# Number of batches within which rows are sorted by length. 64 batches leave hardly any padding, and
# still differ from epoch to epoch.
_BATCHES_TO_SORT = 64


@dataclass(frozen=True, kw_only=True)
class SFTBatch:
    """Arrays of some rows. Each target is the token that follows its input.

    The first `lengths` targets of a row are real, and `mask` is True on those that are learned. The
    last token of a demonstration is never an input, so no target is in the next demonstration.
    `segments` numbers the demonstrations of a row; it is None if no row has two.
    """

    inputs: Int[mx.array, "batch time"]
    targets: Int[mx.array, "batch time"]
    lengths: Int[mx.array, " batch"]
    mask: Bool[mx.array, "batch time"]
    learned: Int[mx.array, " tokens"]
    """The places of True in the flattened mask."""
    segments: Int[mx.array, "batch time"] | None


def make_sft_batch(rows: Sequence[PackedRow]) -> SFTBatch:
    """Return the rows as arrays, padded on the right to the longest row."""
    lengths = [sum(len(one.tokens) - 1 for one in row) for row in rows]
    shape = (len(rows), max(lengths))
    inputs, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    mask: np.ndarray = np.zeros(shape, np.bool_)
    segments: np.ndarray = np.full(shape, -1, np.int32)
    for r, row in enumerate(rows):
        start = 0
        for s, one in enumerate(row):
            place = slice(start, start := start + len(one.tokens) - 1)
            inputs[r, place], targets[r, place] = one.tokens[:-1], one.tokens[1:]
            mask[r, place], segments[r, place] = one.mask[1:], s
    return SFTBatch(
        inputs=mx.array(inputs),
        targets=mx.array(targets),
        lengths=mx.array(lengths),
        mask=mx.array(mask),
        learned=mx.array(np.flatnonzero(mask)),
        segments=mx.array(segments) if any(len(row) > 1 for row in rows) else None,
    )


@dataclass(frozen=True)
class BatchStream:
    """Batches from an iterable, such as a curriculum: one batch for each update."""

    batches: Iterable[Sequence[Demonstration]]

    def updates(self, done: int) -> Iterator[Sequence[PackedRow]]:
        """Return the rows of each update after the first `done` updates."""
        return (_check_stream_batch(batch) for batch in islice(self.batches, done, None))


@dataclass(frozen=True)
class Epochs:
    """Every demonstration once in each epoch, `size` rows an update, in an order from the seed.

    With `packed`, demonstrations are packed into rows of at most `packed` tokens.
    """

    demonstrations: Sequence[Demonstration]
    size: int
    seed: int
    packed: int | None = None

    def __post_init__(self) -> None:
        if not self.demonstrations:
            raise TrainingError("there are no demonstrations to train on")

    def updates(self, done: int) -> Iterator[Sequence[PackedRow]]:
        """Return the rows of each update after the first `done` updates, without end."""
        updates = (rows for number in count() for rows in self.epoch(number))
        return islice(updates, done, None)

    def epoch(self, number: int) -> list[list[PackedRow]]:
        """Return the updates of one epoch. One of them may have fewer rows than `size`."""
        rng = Random(f"{self.seed}/{number}")
        total = len(self.demonstrations)
        rows: list[PackedRow] = [[one] for one in rng.sample(self.demonstrations, total)]
        if self.packed:
            rows = pack_rows(self.demonstrations, self.packed, rng)
        pool = _BATCHES_TO_SORT * self.size
        pools = [rows[start : start + pool] for start in range(0, len(rows), pool)]
        ordered: list[PackedRow] = []
        for rows in pools:
            # The sort is stable, so rows of equal length stay in random order.
            ordered += sorted(rows, key=lambda row: sum(len(one.tokens) for one in row))
        updates = [ordered[at : at + self.size] for at in range(0, len(ordered), self.size)]
        rng.shuffle(updates)
        return updates


def batches_by_length(demonstrations: Sequence[Demonstration], size: int) -> list[list[PackedRow]]:
    """Return batches of similar length, shortest first."""
    ordered = sorted(demonstrations, key=lambda one: len(one.tokens))
    rows: list[PackedRow] = [[one] for one in ordered]
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _check_stream_batch(batch: object) -> list[PackedRow]:
    """Return the batch as rows. Raise if it is not a list of demonstrations."""
    given = cast(Sequence[object], batch) if isinstance(batch, Sequence) else ()
    rows: list[PackedRow] = [[one] for one in given if isinstance(one, Demonstration)]
    if not rows or len(rows) < len(given):
        raise DataError(
            f"a batch of the stream is {batch!r:.60}; expected a list of at least one "
            "Demonstration. Encoding makes demonstrations of texts and rows"
        )
    return rows

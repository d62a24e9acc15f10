"""Demonstrations to rows, rows to arrays, and the order in which they are learned."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from random import Random
from typing import cast

import mlx.core as mx
import numpy as np
from jaxtyping import Bool, Int

from textpolicy.errors import DataError, TrainingError
from textpolicy.training.sft.demonstrations import Demonstration

PackedRow = Sequence[Demonstration]
"""What stands in one row of a batch: one demonstration, or several packed one after another."""

# Batches of an epoch among which lengths are sorted: enough for hardly any padding, few enough for
# batches that are others in every epoch.
_POOL = 64


@dataclass(frozen=True, kw_only=True)
class SFTBatch:
    """Arrays of some rows: each target is the token that follows its input.

    Of each row the first of `lengths` targets are real, and of those `mask` says which are learned.
    The last token of a demonstration is never an input, so no target lies in the next one.
    `segments` tells packed demonstrations of a row apart; None where no row has two.
    """

    inputs: Int[mx.array, "batch time"]
    targets: Int[mx.array, "batch time"]
    lengths: Int[mx.array, " batch"]
    mask: Bool[mx.array, "batch time"]
    learned: Int[mx.array, " tokens"]
    """Places of True in the flattened mask."""
    segments: Int[mx.array, "batch time"] | None


def make_sft_batch(rows: Sequence[PackedRow]) -> SFTBatch:
    """Arrays of the rows, padded on the right to the longest."""
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
    """Batches that somebody else draws, such as a curriculum: one for each update."""

    batches: Iterable[Sequence[Demonstration]]

    def updates(self, done: int) -> Iterator[Sequence[PackedRow]]:
        """The rows of each update after the first `done`."""
        return (_drawn(batch) for batch in islice(self.batches, done, None))


@dataclass(frozen=True)
class Epochs:
    """Every demonstration once an epoch, `size` rows an update, in an order that the seed decides.

    With `packed`, a row takes as many demonstrations as fit into so many tokens.
    """

    demonstrations: Sequence[Demonstration]
    size: int
    seed: int
    packed: int | None = None

    def __post_init__(self) -> None:
        if not self.demonstrations:
            raise TrainingError("there are no demonstrations to train on")

    def updates(self, done: int) -> Iterator[Sequence[PackedRow]]:
        """The rows of each update after the first `done`, without end."""
        every = (rows for epoch in count() for rows in self.epoch(epoch))
        return islice(every, done, None)

    def epoch(self, number: int) -> list[list[PackedRow]]:
        """The updates of one epoch; the last to be cut may be short, and stands anywhere."""
        rng = Random(f"{self.seed}/{number}")
        rows: list[PackedRow] = [[one] for one in rng.sample(self.demonstrations, self._count)]
        if self.packed:
            rows = pack_rows(self.demonstrations, self.packed, rng)
        pool = _POOL * self.size
        pools = [rows[start : start + pool] for start in range(0, len(rows), pool)]
        # Python's sort keeps the random order of rows that are equally long.
        ordered = [row for rows in pools for row in sorted(rows, key=_length)]
        updates = [ordered[at : at + self.size] for at in range(0, len(ordered), self.size)]
        rng.shuffle(updates)
        return updates

    @property
    def _count(self) -> int:
        return len(self.demonstrations)


def _drawn(batch: object) -> list[PackedRow]:
    """The batch as rows, if it is one."""
    given = cast(Sequence[object], batch) if isinstance(batch, Sequence) else ()
    rows: list[PackedRow] = [[one] for one in given if isinstance(one, Demonstration)]
    if not rows or len(rows) < len(given):
        raise DataError(
            f"a batch of the stream is {batch!r:.60}; expected a list of at least one "
            "Demonstration, which Encoding makes of texts and rows"
        )
    return rows


def pack_rows(demonstrations: Sequence[Demonstration], length: int, rng: Random) -> list[PackedRow]:
    """Rows of at most `length` targets: each demonstration goes to the fullest row with room.

    A demonstration that is longer has a row of its own.
    """
    order = rng.sample(demonstrations, len(demonstrations))
    rows: list[list[Demonstration]] = []
    # Rows with room by how much: at most `length` numbers to look through for each demonstration.
    rooms: dict[int, list[int]] = {}
    for one in sorted(order, key=lambda one: -len(one.tokens)):
        need = len(one.tokens) - 1
        room = min((room for room, open_ in rooms.items() if open_ and room >= need), default=None)
        if room is None:
            row, room = len(rows), max(length, need)
            rows.append([])
        else:
            row = rooms[room].pop()
        rows[row].append(one)
        if room > need:
            rooms.setdefault(room - need, []).append(row)
    rng.shuffle(rows)
    return list(rows)


def batches_by_length(demonstrations: Sequence[Demonstration], size: int) -> list[list[PackedRow]]:
    """Batches of like length, shortest first."""
    rows: list[PackedRow] = [
        [one] for one in sorted(demonstrations, key=lambda one: len(one.tokens))
    ]
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _length(row: PackedRow) -> int:
    return sum(len(one.tokens) for one in row)

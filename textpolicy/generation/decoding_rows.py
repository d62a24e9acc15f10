"""Rows in the making, and what the device holds of those that decode together."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
from jaxtyping import Float, UInt32

from textpolicy.types import StopReason

StopRule = Callable[[list[int]], StopReason | None]
"""Given a row's drawn tokens: why it ends here, or None to go on."""

DrawnTokens = tuple[UInt32[mx.array, " rows"], Float[mx.array, " rows"]]
"""A token of each row, and its log-probability."""


@dataclass(slots=True)
class DecodingRow:
    """One completion in the making. Its cache holds the first `read` tokens of its context."""

    prompt: int
    member: int
    context: list[int]
    tokens: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])
    stop_reason: StopReason | None = None
    read: int = 0

    def after(self, heard: list[int]) -> "DecodingRow":
        """The next turn of this row: all it has read and said, and what it heard since."""
        said = self.context + self.tokens
        # The last token drawn has not been through the model.
        return DecodingRow(self.prompt, self.member, said + heard, read=len(said) - 1)

    def take(self, token: int, logprob: float, stop: StopRule, max_tokens: int) -> bool:
        """Add a token; returns whether the row ends with it."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        full = len(self.tokens) >= max_tokens
        self.stop_reason = stop(self.tokens) or (StopReason.LENGTH if full else None)
        return self.stop_reason is not None


RespondToRow = Callable[[DecodingRow], list[int] | None]
"""Given a row that ended: the tokens that it hears before its next turn, or None if it is over."""


@dataclass(slots=True)
class DecodingBatch:
    """The rows being decoded, and their device state in the same order.

    `keys` are those of the next draw. `drawn` is what the device may still be computing and no row
    has taken yet; `last` are then these tokens.
    """

    rows: list[DecodingRow]
    cache: list[Any]
    last: mx.array
    keys: UInt32[np.ndarray, "rows 2"]
    drawn: DrawnTokens | None = None

    @property
    def going(self) -> int:
        """How many rows have not ended."""
        return sum(row.stop_reason is None for row in self.rows)

    def join(self, other: "DecodingBatch") -> "DecodingBatch":
        """Both; neither is to be used afterwards. Tokens are pending in both or in none."""
        for mine, theirs in zip(self.cache, other.cache, strict=True):
            mine.extend(theirs)
        pending = zip(self.drawn or (), other.drawn or (), strict=True)
        return DecodingBatch(
            rows=self.rows + other.rows,
            cache=self.cache,
            last=mx.concatenate([self.last, other.last]),
            keys=np.concatenate([self.keys, other.keys]),
            drawn=_pair([mx.concatenate([*both]) for both in pending]),
        )

    def pick(self, indices: list[int]) -> "DecodingBatch":
        """A copy of these rows; this stays as it is."""
        return self._filtered(deepcopy(self.cache), indices)

    def without_finished(self) -> "DecodingBatch | None":
        """What goes on, if anything does; this is not to be used afterwards."""
        keep = [i for i, row in enumerate(self.rows) if row.stop_reason is None]
        return self._filtered(self.cache, keep) if keep else None

    def _filtered(self, cache: list[Any], indices: list[int]) -> "DecodingBatch":
        index = mx.array(indices)
        for layer in cache:
            layer.filter(index)
        return DecodingBatch(
            rows=[self.rows[i] for i in indices],
            cache=cache,
            last=self.last[index],
            keys=self.keys[indices],
            drawn=_pair([array[index] for array in self.drawn or ()]),
        )


def join(active: DecodingBatch | None, fresh: DecodingBatch | None) -> DecodingBatch | None:
    """The rows of both, if there are any."""
    return active.join(fresh) if active and fresh else active or fresh


def _pair(arrays: Sequence[mx.array]) -> DrawnTokens | None:
    return (arrays[0], arrays[1]) if arrays else None

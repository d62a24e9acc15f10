"""Rows that are being decoded, a batch of such rows, and the KV cache of the batch."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, cast

import mlx.core as mx
import numpy as np
from jaxtyping import Int, UInt32
from mlx_lm.models.cache import BatchKVCache, KVCache

from textpolicy.generation.sampling import NEXT_KEY, SamplingPlan, plan_sampling
from textpolicy.types import Sampling, StopReason

StopRule = Callable[[list[int]], StopReason | None]
"""Takes the tokens that a row has sampled; returns why the row ends now, or None to continue."""
Key = UInt32[np.ndarray, " 2"]


@dataclass(frozen=True, slots=True)
class TokenDetails:
    """What the model itself says of a sampled token, before temperature, truncation and penalty.

    `logprob` is the log-probability of the token, and `top` are the likeliest tokens with theirs.
    """

    logprob: float
    top: Sequence[tuple[int, float]]


@dataclass(slots=True, eq=False, kw_only=True)
class DecodingRow:
    """A completion that is being decoded.

    `key` decides the draws of the row, whatever decodes beside it. `prompt` and `member` are
    numbers that the caller chooses. With `top_logprobs`, `details` has an entry for each token,
    with that many of the likeliest tokens. `on_token` is called after each token. `may_continue`
    says that the row may get a reply when it has ended, and `keep_prefix` that a later prompt may
    begin with its text. The KV cache holds `cached` tokens of the context. `versions` are the
    adapter versions of the tokens, if the engine takes new versions between tokens.
    """

    context: list[int]
    sampling: Sampling
    stop: StopRule
    key: Key
    prompt: int = 0
    member: int = 0
    top_logprobs: int | None = None
    on_token: "Callable[[DecodingRow], None] | None" = None
    may_continue: bool = False
    keep_prefix: bool = False
    tokens: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])
    versions: list[int] = field(default_factory=list[int])
    details: list[TokenDetails] = field(default_factory=list[TokenDetails])
    stop_reason: StopReason | None = None
    cached: int = 0

    @property
    def mixed_versions(self) -> list[int]:
        """The versions of the tokens if there are several, else none."""
        return self.versions if len({*self.versions}) > 1 else []

    def next_turn(self, reply: list[int]) -> "DecodingRow":
        """Return the row of the next turn: its context is this row's tokens and the reply."""
        history = self.context + self.tokens
        # The model has not processed the last sampled token.
        return replace(
            self,
            context=history + reply,
            tokens=[],
            logprobs=[],
            versions=[],
            details=[],
            stop_reason=None,
            cached=len(history) - 1,
        )

    def append(self, token: int, logprob: float) -> bool:
        """Append a sampled token and return whether the row ends with this token."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        full = len(self.tokens) >= self.sampling.max_tokens
        self.stop_reason = self.stop(self.tokens) or (StopReason.LENGTH if full else None)
        return self.stop_reason is not None


@dataclass(slots=True)
class DrawnDetails:
    """The arrays of the `TokenDetails` of some rows: chosen token, likeliest tokens, and theirs."""

    rows: Sequence[DecodingRow]
    logprobs: mx.array
    top_tokens: mx.array
    top_logprobs: mx.array


@dataclass(slots=True)
class DrawnTokens:
    """The tokens that a step drew, and their log-probabilities, on the device.

    `versions` are those of the adapters that computed them, if the engine takes new versions
    between tokens.
    """

    tokens: mx.array
    logprobs: mx.array
    details: Sequence[DrawnDetails] = ()
    versions: Sequence[int] = ()

    def select(self, indices: list[int]) -> "DrawnTokens":
        """Return the tokens of some rows. The details find their rows by themselves."""
        index = mx.array(indices)
        versions = [self.versions[i] for i in indices] if self.versions else ()
        return DrawnTokens(self.tokens[index], self.logprobs[index], self.details, versions)

    def merge(self, other: "DrawnTokens") -> "DrawnTokens":
        """Return the tokens of the rows of both."""
        return DrawnTokens(
            mx.concatenate([self.tokens, other.tokens]),
            mx.concatenate([self.logprobs, other.logprobs]),
            [*self.details, *other.details],
            [*self.versions, *other.versions],
        )


@dataclass(slots=True)
class DecodingBatch:
    """The rows that decode together, and their device arrays in the same order.

    `keys` are the random keys of the next draw. `pending` is a step that the device may still
    compute and that `rows` do not have yet, or None. `last_tokens` are the tokens that the model
    reads next.
    """

    rows: list[DecodingRow]
    cache: list[Any]
    last_tokens: mx.array
    keys: UInt32[np.ndarray, "rows 2"]
    pending: DrawnTokens | None = None
    plan: SamplingPlan = field(init=False)

    def __post_init__(self) -> None:
        self.plan = plan_sampling([row.sampling for row in self.rows])

    @property
    def unfinished(self) -> int:
        """The number of rows that have not ended."""
        return sum(row.stop_reason is None for row in self.rows)

    @property
    def can_take_back(self) -> bool:
        """Whether the position that a pending step has added to the cache can be removed."""
        return all(isinstance(layer, BatchKVCache) for layer in self.cache)

    @property
    def positions(self) -> list[mx.array]:
        """The position of each row's next token, an array for each layer, if all have one."""
        return [layer.offset for layer in self.cache] if self.can_take_back else []

    def copy_rows(self, indices: list[int]) -> "DecodingBatch":
        """Return a batch with copies of these rows and of their cache, without a pending step."""
        rows = self._select(deepcopy(self.cache), indices)
        if rows.pending is not None:
            for layer in rows.cache:
                layer.trim(1)
            rows.keys, rows.pending = rows.keys - NEXT_KEY, None
        return rows

    def read_text(self, index: int) -> tuple[list[int], list[KVCache]]:
        """Return the tokens of a row that the model has read, and a copy of their cache."""
        row, cache = self.rows[index], [layer.extract(index) for layer in self.cache]
        return (row.context + row.tokens)[: cache[0].offset], cache

    def keep_rows(self, indices: list[int]) -> "DecodingBatch":
        """Return a batch of these rows.

        The new batch takes over the cache: do not use this batch afterwards.
        """
        return self._select(self.cache, indices)

    def drop_finished(self) -> "DecodingBatch | None":
        """Return what `keep_rows` of the unfinished rows returns, or None if all have ended."""
        keep = [i for i, row in enumerate(self.rows) if row.stop_reason is None]
        return self.keep_rows(keep) if keep else None

    def _select(self, cache: list[Any], indices: list[int]) -> "DecodingBatch":
        index = mx.array(indices)
        for layer in cache:
            layer.filter(index)
        return DecodingBatch(
            rows=[self.rows[i] for i in indices],
            cache=cache,
            last_tokens=self.last_tokens[index],
            keys=self.keys[indices],
            pending=self.pending and self.pending.select(indices),
        )


def merge_batches(first: DecodingBatch | None, second: DecodingBatch) -> DecodingBatch:
    """Return one batch with the rows of both; do not use the two batches afterwards.

    Either both batches have a pending step or neither has.
    """
    if first is None:
        return second
    for ours, theirs in zip(first.cache, second.cache, strict=True):
        ours.extend(theirs)
    return DecodingBatch(
        rows=first.rows + second.rows,
        cache=first.cache,
        last_tokens=mx.concatenate([first.last_tokens, second.last_tokens]),
        keys=np.concatenate([first.keys, second.keys]),
        pending=first.pending and second.pending and first.pending.merge(second.pending),
    )


class DecodingCache(BatchKVCache):
    """A `BatchKVCache` that knows how far each row is padded without asking the device.

    On a CPU, the mask of mlx-lm's cache costs a tenth of a decode step, so it is built only when a
    row is padded. Most positions of a short prompt's cache are unused, so they are not copied.
    """

    # None until the device has been asked.
    _padding: list[int] | None = None

    @classmethod
    def repeat_prompts(
        cls, prompts: BatchKVCache, owner: Int[mx.array, " rows"], room: int
    ) -> "DecodingCache":
        """Return a cache in which row r holds prompt `owner[r]` and `room` unused positions."""
        if prompts.empty():
            return cls([0] * owner.size)
        keys: Any
        values: Any
        keys, values, offset, padding, used = prompts.state
        rows = cls([])
        # The positions are cut and added once for each prompt, not for each of its rows.
        unused = [(0, 0), (0, 0), (0, room), (0, 0)]
        keys, values = (mx.pad(x[..., :used, :], unused) for x in (keys, values))
        rows.state = keys, values, offset, padding, used
        rows.filter(owner)
        return rows

    @property
    def state(self) -> Any:
        """Keys, values, offsets, padding, and the number of used positions."""
        return self.keys, self.values, self.offset, self.left_padding, self._idx

    @state.setter
    def state(self, v: Any) -> None:
        self.keys, self.values, self.offset, self.left_padding, self._idx = v
        self._padding = None

    @property
    def padding(self) -> list[int]:
        """The number of unused positions before each row."""
        if self._padding is None:
            self._padding = cast(list[int], self.left_padding.tolist())
        return self._padding

    @property
    def used(self) -> int:
        """The number of positions that rows have in the cache, padding included."""
        return self._idx

    def make_room(self, keys: Sequence[int], values: Sequence[int]) -> None:
        """Have memory for one more position, whose keys and values have these shapes."""
        if self.keys is None:
            self.keys, self.values = (mx.zeros((*x[:2], self.step, x[3])) for x in (keys, values))
        elif self.keys.shape[2] == self._idx:
            more = [(0, 0), (0, 0), (0, self.step), (0, 0)]
            self.keys, self.values = mx.pad(self.keys, more), mx.pad(self.values, more)

    def take_step(self, keys: mx.array, values: mx.array, offset: mx.array) -> None:
        """Take over keys and values to which one position has been added, and the new offsets."""
        self.keys, self.values, self.offset = keys, values, offset
        self._idx += 1

    def make_mask(self, N: int, return_array: bool = False, **kwargs: Any) -> Any:
        """Return None if each row adds one position and may attend to every key."""
        if N == 1 and kwargs.get("window_size") is None and not any(self.padding):
            return None
        return super().make_mask(N, return_array, **kwargs)

    def filter(self, batch_indices: Int[mx.array, " rows"]) -> None:
        """Keep these rows, and cut off the positions that all of them leave unused."""
        padding = [self.padding[index] for index in cast(list[int], batch_indices.tolist())]
        unused = min(padding)
        if self.keys is not None:
            self.keys = self.keys[batch_indices][..., unused:, :]
            self.values = self.values[batch_indices][..., unused:, :]
        self.offset = self.offset[batch_indices]
        self.left_padding = self.left_padding[batch_indices] - unused
        self._idx -= unused
        self._padding = [number - unused for number in padding]

    def extend(self, other: BatchKVCache) -> None:
        """Add the rows of the other cache."""
        theirs = other.padding if isinstance(other, DecodingCache) else other.left_padding.tolist()
        both = (self._idx, self.padding), (other._idx, cast(list[int], theirs))
        longest = max(self._idx, other._idx)
        super().extend(other)
        self._padding = [number + longest - used for used, rows in both for number in rows]

    def finalize(self) -> None:
        super().finalize()
        self._padding = None

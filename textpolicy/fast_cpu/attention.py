"""Attention with the softmax written out, and its gradient in closed form.

With S = Q K' the scores of scaled queries, P = softmax(S) and O = P V:

    dV = P' dO        dS = P (dO V' - sum(dO O))        dQ = dS K        dK = dS' Q

Scores exist for a piece at a time, some rows of the batch or some positions of one row, and the
backward pass computes them again: Rabe & Staats 2021, Self-attention Does Not Need O(n^2) Memory,
arXiv:2112.05682. The query heads that share keys are rows of one product.
"""

import math
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from jaxtyping import Float
from mlx_lm.models import base

from textpolicy.fast_cpu.array_slices import SLICE_SIZE, compute_after
from textpolicy.fast_cpu.exponential import LOG2_E, exp2

# Named in shapes: `together` query heads share each of the key heads.
Folded = Float[mx.array, "batch key_heads together time width"]
AttentionScores = Float[mx.array, "batch key_heads together time all"]
Output = Float[mx.array, "batch key_heads together time value_width"]
Keys = Float[mx.array, "batch key_heads all width"]
Values = Float[mx.array, "batch key_heads all value_width"]
# Taken off a score, this leaves no digit of it: a row that sees nothing looks at everything alike.
_UNSEEN = 1e30


def scaled_dot_product_attention(
    queries: Float[mx.array, "batch heads time width"],
    keys: Any,
    values: Any,
    cache: Any,
    scale: float,
    mask: Any,
    sinks: mx.array | None = None,
) -> Float[mx.array, "batch heads time value_width"]:
    """mlx-lm's function of that name; what is not sped up here is left to it."""
    added = isinstance(mask, mx.array) and mask.dtype != mx.bool_
    if added or sinks is not None or hasattr(cache, "bits") or queries.dtype != mx.float32:
        return base.scaled_dot_product_attention(
            queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks
        )
    batch, heads, time, width = queries.shape
    key_heads = keys.shape[1]
    if isinstance(mask, mx.array):
        mask = _by_key_head(mask, key_heads, heads // key_heads)
    # With their powers of e as powers of 2, no score needs to be multiplied again.
    folded = (queries * (scale * LOG2_E)).reshape(batch, key_heads, -1, time, width)
    return _attention(mask)(folded, keys, values).reshape(batch, heads, time, -1)


def _by_key_head(mask: mx.array, key_heads: int, together: int) -> mx.array:
    """The mask with the axes of scores; those of one number are those that it has of one."""
    batch, heads, time, width = (1, 1, 1, *mask.shape)[-4:]
    apart = (1, 1) if heads == 1 else (key_heads, together)
    return mask.reshape(batch, *apart, time, width)


def _attention(mask: Any) -> Any:
    """A function of folded queries, keys and values, with its gradient."""

    def forward(queries: Folded, keys: Keys, values: Values) -> Output:
        rows: list[mx.array] = []
        done: list[mx.array] = []
        for places in _pieces(queries, keys):
            times: list[mx.array] = []
            for place in places:
                query = compute_after(place.of(queries), done)
                weight = _weights(query, keys[place.rows], place.unseen(mask))
                total = weight.sum(axis=-1, keepdims=True)
                done = [_product(weight, values[place.rows]) / total]
                times += done
            rows.append(_joined(times, axis=3))
        return _joined(rows, axis=0)

    def backward(
        primals: tuple[Folded, Keys, Values], cotangent: Output, output: Output
    ) -> list[mx.array]:
        queries, keys, values = primals
        rows: list[list[mx.array]] = []
        done: list[mx.array] = []
        for places in _pieces(queries, keys):
            of_queries: list[mx.array] = []
            for place in places:
                query, slope = compute_after(place.of(queries), done), place.of(cotangent)
                mine = keys[place.rows], values[place.rows]
                slopes = _slopes(query, *mine, place.unseen(mask), slope, place.of(output))
                of_query, *of_mine = slopes
                if of_queries:
                    of_mine = [x + y for x, y in zip(done[1:], of_mine, strict=True)]
                of_queries.append(of_query)
                done = [of_query, *of_mine]
            rows.append([_joined(of_queries, axis=3), *done[1:]])
        return [_joined([*parts], axis=0) for parts in zip(*rows, strict=True)]

    run: Any = mx.custom_function(forward)
    run.vjp(backward)
    return run


def _slopes(
    query: Folded, key: Keys, value: Values, unseen: mx.array | None, slope: Output, output: Output
) -> list[mx.array]:
    """What queries, keys and values at one place change, from what their output does."""
    weight = _weights(query, key, unseen)
    share = weight / weight.sum(axis=-1, keepdims=True)
    mean = (slope * output).sum(axis=-1, keepdims=True)
    of_scores = share * (_product(slope, value.swapaxes(-1, -2)) - mean)
    if unseen is not None:
        of_scores = of_scores * (1 - unseen)
    return [
        _product(of_scores, key) * math.log(2),
        _transposed_product(of_scores, query * math.log(2)),
        _transposed_product(share, slope),
    ]


def _weights(query: Folded, key: Keys, unseen: mx.array | None) -> AttentionScores:
    """2 to the power of every score, below the largest of its row."""
    scores = _product(query, key.swapaxes(-1, -2))
    if unseen is not None:
        scores = scores - unseen * _UNSEEN
    return exp2(scores - scores.max(axis=-1, keepdims=True))


def _product(x: mx.array, matrix: mx.array) -> mx.array:
    """Of every query head's rows with the matrix of its key head."""
    return (x.flatten(2, 3) @ matrix).reshape(*x.shape[:-1], -1)


def _transposed_product(x: mx.array, y: mx.array) -> mx.array:
    """A sum over the query heads of a key head, and over their rows."""
    return x.flatten(2, 3).swapaxes(-1, -2) @ y.flatten(2, 3)


def _joined(parts: list[mx.array], *, axis: int) -> mx.array:
    return mx.concatenate(parts, axis=axis) if len(parts) > 1 else parts[0]


@dataclass(frozen=True, slots=True)
class _Place:
    """Some rows of the batch, some positions of them, and how many keys these may look at."""

    rows: slice
    times: slice
    first: int
    """The key at which the first of the positions is, where queries are the last of all."""
    width: int

    def of(self, x: mx.array) -> mx.array:
        """Its part of an array."""
        return x[self.rows, :, :, self.times]

    def unseen(self, mask: Any) -> mx.array | None:
        """1 for the keys that a position here does not see, and 0 for others; None for none."""
        if mask is None:
            return None
        if isinstance(mask, str):
            own = mx.arange(self.first, self.first + self.times.stop - self.times.start)
            return (mx.arange(self.width) > own[:, None]).astype(mx.float32)
        rows = self.rows if mask.shape[0] > 1 else slice(None)
        times = self.times if mask.shape[3] > 1 else slice(None)
        return 1 - mask[rows, :, :, times].astype(mx.float32)


def _pieces(queries: Folded, keys: Keys) -> list[list[_Place]]:
    """All rows of the batch, and of each all positions, with about a piece of scores at a place."""
    batch, key_heads, together, time, _ = queries.shape
    width = keys.shape[2]
    heads = key_heads * together
    rows = max(1, SLICE_SIZE // (heads * time * width))
    times = time if rows > 1 else max(1, SLICE_SIZE // (heads * width))

    def place(row: int, at: int) -> _Place:
        until = min(at + times, time)
        return _Place(slice(row, row + rows), slice(at, until), width - time + at, width)

    return [[place(row, at) for at in range(0, time, times)] for row in range(0, batch, rows)]

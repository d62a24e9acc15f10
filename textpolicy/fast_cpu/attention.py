"""Attention with the softmax written out and a closed-form gradient.

With scores S = Q K' of scaled queries, P = softmax(S) and O = P V:

    dV = P' dO        dS = P (dO V' - sum(dO O))        dQ = dS K        dK = dS' Q

Scores exist for one slice at a time: some rows of the batch, or some positions of one row. The
backward pass computes the scores again: Rabe & Staats 2021, Self-attention Does Not Need O(n^2)
Memory, arXiv:2112.05682. Query heads that share a key head are rows of one matrix product.

In a decode step, a compiled function reads keys and values where they lie in the cache. Of many
positions, compiled functions compute attention and its gradients, with scores for 32 positions of
one head at a time.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
from jaxtyping import Float
from mlx_lm.models import base

from textpolicy.fast_cpu.array_slices import SLICE_SIZE, compute_after
from textpolicy.fast_cpu.exponential import LOG2_E, exp2, softmax
from textpolicy.fast_cpu.gradients import are_gradients_needed, with_gradient
from textpolicy.fast_cpu.mlx_operations import bits_of, compiled_operation, reason_of_none

# In these shapes, `sharing` query heads use each of the key heads.
GroupedQueries = Float[mx.array, "batch key_heads sharing time width"]
AttentionScores = Float[mx.array, "batch key_heads sharing time all"]
AttentionOutput = Float[mx.array, "batch key_heads sharing time value_width"]
Keys = Float[mx.array, "batch key_heads all width"]
Values = Float[mx.array, "batch key_heads all value_width"]
# Subtracting this from a score leaves no digit of the score. A query that may see no key therefore
# weighs all keys alike.
_MASKED = 1e30


def scaled_dot_product_attention(
    queries: Float[mx.array, "batch heads time width"],
    keys: Any,
    values: Any,
    cache: Any,
    scale: float,
    mask: Any,
    sinks: mx.array | None = None,
) -> Float[mx.array, "batch heads time value_width"]:
    """Return what mlx-lm's function of this name returns; call that one for the rarer arguments."""
    added = isinstance(mask, mx.array) and mask.dtype != mx.bool_
    if added or sinks is not None or hasattr(cache, "bits") or queries.dtype != mx.float32:
        return base.scaled_dot_product_attention(
            queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks
        )
    if can_be_compiled(queries, keys, values, mask):
        if queries.shape[2] == 1 and not are_gradients_needed():
            return _attend_where_stored(queries, keys, values, scale, mask)
        if queries.shape[2] > 1 and queries.shape[-1] % 16 == values.shape[-1] % 16 == 0:
            return _attend_compiled(mask, scale)(queries, keys, values)[0].swapaxes(1, 2)
    batch, heads, time, width = queries.shape
    key_heads = keys.shape[1]
    if isinstance(mask, mx.array):
        # With the five axes of scores; axes of length 1 stay.
        rows, mask_heads, times, seen = (1, 1, 1, *mask.shape)[-4:]
        by_head = (1, 1) if mask_heads == 1 else (key_heads, heads // key_heads)
        mask = mask.reshape(rows, *by_head, times, seen)
    # In a decode step, the operations of slices take longer to begin than to run.
    if time == 1 and not isinstance(mask, str) and batch * heads * keys.shape[2] <= SLICE_SIZE:
        grouped = (queries * scale).reshape(batch, key_heads, -1, time, width)
        return _attend_at_once(grouped, keys, values, mask).reshape(batch, heads, time, -1)
    # The factor log2(e) turns powers of e into powers of 2, at no extra cost for each score.
    grouped = (queries * (scale * LOG2_E)).reshape(batch, key_heads, -1, time, width)
    return _attention(mask)(grouped, keys, values).reshape(batch, heads, time, -1)


def can_be_compiled(queries: mx.array, keys: mx.array, values: mx.array, mask: Any) -> bool:
    """Return whether compiled functions can be used: they trust what is checked here."""
    if mx.default_device().type != mx.cpu or reason_of_none():
        return False
    if keys.dtype != mx.float32 or values.dtype != mx.float32:
        return False
    rows, heads, time, width = queries.shape
    stored, key_heads, seen, key_width = keys.shape
    fits = keys.shape[:3] == values.shape[:3] and key_width == width and not heads % key_heads
    if not fits or stored not in (1, rows) or not queries.size * seen * values.size:
        return False
    if not isinstance(mask, mx.array):
        return mask is None or time <= seen
    masks, mask_heads, times, masked = (1, 1, 1, *mask.shape)[-4:]
    heads_fit = mask_heads == 1 or (time > 1 and mask_heads == heads)
    shape_fits = masks in (1, rows) and times in (1, time) and masked == seen
    return mask.dtype == mx.bool_ and mask.ndim <= 4 and heads_fit and shape_fits


def _attend_where_stored(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: Any
) -> mx.array:
    """Return attention by the compiled function, which copies neither keys nor values."""
    rows, heads, _, width = queries.shape
    _, key_heads, seen, value_width = values.shape
    masks = [mask] if isinstance(mask, mx.array) else []
    attention = compiled_operation("attention", 3 + len(masks), as_stored=True)
    sizes = rows, key_heads, heads // key_heads, seen, width, value_width
    (out,) = attention(
        (queries, keys, values, *masks),
        [(rows, heads, 1, value_width)],
        (*sizes, bits_of(scale), len(masks)),
    )
    return out


def _attend_compiled(mask: Any, scale: float) -> Any:
    """Return attention of many positions with its gradients, by compiled functions.

    The function returns the result as rows x positions x heads x numbers, the order in which the
    next product reads it, and two numbers for each row, head and position.
    """
    masks = [mask] if isinstance(mask, mx.array) else []
    kind = 2 if masks else int(mask is not None)

    def sizes(queries: mx.array, keys: mx.array, values: mx.array) -> tuple[int, ...]:
        rows, heads, time, width = queries.shape
        _, key_heads, seen, value_width = values.shape
        shared = heads // key_heads
        return rows, key_heads, shared, time, seen, width, value_width, bits_of(scale), kind

    def attend(queries: mx.array, keys: mx.array, values: mx.array) -> list[mx.array]:
        rows, heads, time, _ = queries.shape
        operation = compiled_operation("attention_of_positions", 3 + len(masks), 2, as_stored=True)
        return operation(
            (queries, keys, values, *masks),
            [(rows, time, heads, values.shape[-1]), (rows, heads, time, 2)],
            sizes(queries, keys, values),
        )

    def gradients(primals: Any, cotangents: Any, results: Any) -> list[mx.array]:
        queries, keys, values = primals
        rows, heads, time, width = queries.shape
        (out, stats), of_out = results, cotangents[0]
        of_keys, of_values = ((rows, *x.shape[1:]) for x in (keys, values))
        operation = compiled_operation("attention_gradients", 6 + len(masks), 3, as_stored=True)
        of_queries, *others = operation(
            (queries, keys, values, out.swapaxes(1, 2), stats, of_out.swapaxes(1, 2), *masks),
            [(rows, time, heads, width), of_keys, of_values],
            sizes(queries, keys, values),
        )
        if len(keys) < rows:
            others = [x.sum(axis=0, keepdims=True) for x in others]
        return [of_queries.swapaxes(1, 2), *others]

    return with_gradient(attend, gradients)


def _attend_at_once(
    queries: GroupedQueries, keys: Keys, values: Values, mask: Any
) -> AttentionOutput:
    scores = _product(queries, keys.swapaxes(-1, -2))
    if mask is not None:
        scores = mx.where(mask, scores, -_MASKED)
    return _product(softmax(scores), values)


def _attention(mask: Any) -> Any:
    """Return attention under this mask, as a function with its gradient."""
    return with_gradient(partial(_attend, mask), partial(_attention_gradient, mask))


def _attend(mask: Any, queries: GroupedQueries, keys: Keys, values: Values) -> AttentionOutput:
    rows: list[mx.array] = []
    last: list[mx.array] = []
    for slices in _slices(queries, keys):
        outputs: list[mx.array] = []
        for part in slices:
            query = compute_after(part.of(queries), last)
            weights = _weights(query, keys[part.rows], part.hidden(mask))
            total = weights.sum(axis=-1, keepdims=True)
            last = [_product(weights, values[part.rows]) / total]
            outputs += last
        rows.append(mx.concatenate(outputs, axis=3))
    return mx.concatenate(rows, axis=0)


def _attention_gradient(
    mask: Any,
    primals: tuple[GroupedQueries, Keys, Values],
    cotangent: AttentionOutput,
    output: AttentionOutput,
) -> list[mx.array]:
    queries, keys, values = primals
    rows: list[list[mx.array]] = []
    last: list[mx.array] = []
    for slices in _slices(queries, keys):
        query_gradients: list[mx.array] = []
        for part in slices:
            query, gradient = compute_after(part.of(queries), last), part.of(cotangent)
            row = keys[part.rows], values[part.rows]
            query_gradient, *row_gradients = _gradients(
                query, *row, part.hidden(mask), gradient, part.of(output)
            )
            if query_gradients:
                row_gradients = [x + y for x, y in zip(last[1:], row_gradients, strict=True)]
            query_gradients.append(query_gradient)
            last = [query_gradient, *row_gradients]
        rows.append([mx.concatenate(query_gradients, axis=3), *last[1:]])
    return [mx.concatenate([*parts], axis=0) for parts in zip(*rows, strict=True)]


def _gradients(
    query: GroupedQueries,
    key: Keys,
    value: Values,
    hidden: mx.array | None,
    gradient: AttentionOutput,
    output: AttentionOutput,
) -> list[mx.array]:
    """Return the gradients of a slice's queries, keys and values from that of its output."""
    weights = _weights(query, key, hidden)
    probabilities = weights / weights.sum(axis=-1, keepdims=True)
    mean = (gradient * output).sum(axis=-1, keepdims=True)
    scores = probabilities * (_product(gradient, value.swapaxes(-1, -2)) - mean)
    if hidden is not None:
        scores = scores * (1 - hidden)
    return [
        _product(scores, key) * math.log(2),
        _transposed_product(scores, query * math.log(2)),
        _transposed_product(probabilities, gradient),
    ]


def _weights(query: GroupedQueries, key: Keys, hidden: mx.array | None) -> AttentionScores:
    """Return 2 to the power of every score less the largest score of its query."""
    scores = _product(query, key.swapaxes(-1, -2))
    if hidden is not None:
        scores = scores - hidden * _MASKED
    return exp2(scores - scores.max(axis=-1, keepdims=True))


def _product(x: mx.array, matrix: mx.array) -> mx.array:
    """Return the product of every query head's rows with the matrix of its key head."""
    return (x.flatten(2, 3) @ matrix).reshape(*x.shape[:-1], -1)


def _transposed_product(x: mx.array, y: mx.array) -> mx.array:
    """Return x' y for each key head, summed over its query heads and their rows."""
    return x.flatten(2, 3).swapaxes(-1, -2) @ y.flatten(2, 3)


@dataclass(frozen=True, slots=True)
class _Slice:
    """Some rows of the batch, and some positions of these rows.

    `first` is the key at the first position: the queries stand at the last of all `width` keys.
    """

    rows: slice
    times: slice
    first: int
    width: int

    def of(self, x: mx.array) -> mx.array:
        """Return this slice of an array."""
        return x[self.rows, :, :, self.times]

    def hidden(self, mask: Any) -> mx.array | None:
        """Return 1 for each key that a position may not see and 0 for the others, or None."""
        if mask is None:
            return None
        if isinstance(mask, str):
            positions = mx.arange(self.first, self.first + self.times.stop - self.times.start)
            return (mx.arange(self.width) > positions[:, None]).astype(mx.float32)
        rows = self.rows if mask.shape[0] > 1 else slice(None)
        times = self.times if mask.shape[3] > 1 else slice(None)
        return 1 - mask[rows, :, :, times].astype(mx.float32)


def _slices(queries: GroupedQueries, keys: Keys) -> list[list[_Slice]]:
    """Return the slices of each range of rows; a slice has about SLICE_SIZE scores."""
    batch, key_heads, sharing, time, _ = queries.shape
    width = keys.shape[2]
    heads = key_heads * sharing
    rows = max(1, SLICE_SIZE // (heads * time * width))
    times = time if rows > 1 else max(1, SLICE_SIZE // (heads * width))

    return [
        [
            _Slice(
                slice(row, row + rows),
                slice(start, min(start + times, time)),
                first=width - time + start,
                width=width,
            )
            for start in range(0, time, times)
        ]
        for row in range(0, batch, rows)
    ]

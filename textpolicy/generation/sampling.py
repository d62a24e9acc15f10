"""Sampling one token for each row with the row's own random key, and its log-probability."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from jaxtyping import Float, UInt32
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p, make_repetition_penalty

from textpolicy.fast_cpu.drawn_tokens import drawn_tokens
from textpolicy.fast_cpu.exponential import softmax
from textpolicy.types import Sampling

_BLOCK = 128
NEXT_KEY = np.array([0, 1], dtype=np.uint32)
"""The difference between the random keys of a row's draws."""


def random_keys(seed: int, rows: Sequence[tuple[int, int]]) -> UInt32[np.ndarray, "rows 2"]:
    """Return a random key for each (prompt, member), independent of the rest of the batch."""
    digests = [hashlib.blake2b(f"{seed}/{p}/{m}".encode(), digest_size=8) for p, m in rows]
    return np.frombuffer(b"".join(d.digest() for d in digests), np.uint32).reshape(-1, 2)


@dataclass(frozen=True, slots=True)
class SamplingPlan:
    """How the rows of a batch sample: rows that truncate in the same way draw together.

    Each part has a sampling, the indices of its rows, and their temperatures. `place` is where
    the concatenated parts have each row.
    """

    samplings: Sequence[Sampling]
    parts: Sequence[tuple[Sampling, mx.array, mx.array]] = ()
    place: mx.array | None = None

    @property
    def penalises(self) -> bool:
        """Whether the next draw of a row depends on its last token beside the model."""
        return any(sampling.repetition_penalty != 1.0 for sampling in self.samplings)


def plan_sampling(samplings: Sequence[Sampling]) -> SamplingPlan:
    """Return how rows with these samplings draw. Rows that all share one need no parts."""
    if len({_draw_options(one) for one in samplings}) == 1:
        return SamplingPlan(samplings)
    together: dict[Any, list[int]] = {}
    for index, one in enumerate(samplings):
        truncation = (one.temperature == 0, one.top_p, one.top_k, one.min_p)
        together.setdefault(truncation, []).append(index)
    order = [index for indices in together.values() for index in indices]
    parts = [
        (samplings[indices[0]], mx.array(indices), _column(samplings, indices))
        for indices in together.values()
    ]
    return SamplingPlan(samplings, parts, mx.array(np.argsort(order)))


def _draw_options(sampling: Sampling) -> tuple[float, ...]:
    return sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p


def _column(samplings: Sequence[Sampling], indices: Sequence[int]) -> mx.array:
    return mx.array([[float(samplings[index].temperature)] for index in indices])


def draw_by_plan(
    logits: Float[mx.array, "rows vocab"], keys: UInt32[mx.array, "rows 2"], plan: SamplingPlan
) -> tuple[UInt32[mx.array, " rows"], Float[mx.array, " rows"]]:
    """Return what `draw_tokens` returns, for rows that may sample in different ways."""
    if plan.place is None:
        return draw_tokens(logits, keys, plan.samplings[0])
    drawn = [
        draw_tokens(logits[index], keys[index], sampling, temperatures)
        for sampling, index, temperatures in plan.parts
    ]
    tokens, logprobs = (mx.concatenate([*parts])[plan.place] for parts in zip(*drawn, strict=True))
    return tokens, logprobs


def draw_tokens(
    logits: Float[mx.array, "rows vocab"],
    keys: UInt32[mx.array, "rows 2"],
    sampling: Sampling,
    temperatures: Float[mx.array, "rows 1"] | None = None,
) -> tuple[UInt32[mx.array, " rows"], Float[mx.array, " rows"]]:
    """Return a token for each row, and its log-probability under the distribution it is from.

    With `temperatures`, each row has its own one.
    """
    if sampling.temperature == 0:
        return mx.argmax(logits, axis=-1), mx.zeros(logits.shape[0])
    logits = logits.astype(mx.float32)
    if temperatures is not None or sampling.temperature != 1:
        logits = logits / (sampling.temperature if temperatures is None else temperatures)
    if sampling.top_k and sampling.top_k < logits.shape[-1]:
        logits = apply_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        logits = apply_top_p(logits, sampling.top_p)
    if sampling.min_p:
        logits = apply_min_p(logits, sampling.min_p)
    if drawn := drawn_tokens(logits, keys):
        return drawn
    uniforms = mx.vmap(lambda key: mx.random.uniform(shape=(2,), key=key))(keys)
    return _choose_tokens(softmax(logits), uniforms)


def penalise_repetition(
    logits: Float[mx.array, "rows vocab"],
    contexts: Sequence[Sequence[int]],
    penalties: Sequence[float],
) -> Float[mx.array, "rows vocab"]:
    """Return the logits with the tokens of each row's recent context made less likely."""
    rows = [
        logits[row : row + 1]
        if penalty == 1
        else make_repetition_penalty(penalty)(mx.array([*context]), logits[row : row + 1])
        for row, (context, penalty) in enumerate(zip(contexts, penalties, strict=True))
    ]
    return mx.concatenate(rows, axis=0)


def likeliest_tokens(
    logits: Float[mx.array, "rows vocab"], tokens: UInt32[mx.array, " rows"], number: int
) -> tuple[Float[mx.array, " rows"], UInt32[mx.array, "rows top"], Float[mx.array, "rows top"]]:
    """Return the model's log-probability of each token, and its likeliest tokens with theirs."""
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    chosen = mx.take_along_axis(logprobs, tokens[:, None], axis=-1).squeeze(-1)
    top = mx.argsort(-logprobs, axis=-1)[:, :number]
    return chosen, top, mx.take_along_axis(logprobs, top, axis=-1)


def _choose_tokens(
    weights: Float[mx.array, "rows vocab"], uniforms: Float[mx.array, "rows 2"]
) -> tuple[UInt32[mx.array, " rows"], Float[mx.array, " rows"]]:
    """Return a token for each row with a chance proportional to its weight, and the log chance.

    The first number chooses a block of 128 tokens, the second number chooses a token in the block.
    A cumulative sum over the whole vocabulary would lose rare tokens to rounding, and Gumbel noise
    for every token is most of the work of a step when the vocabulary is large.
    """
    rows, vocabulary = weights.shape
    if missing := -vocabulary % _BLOCK:
        weights = mx.pad(weights, [(0, 0), (0, missing)])
    blocks = weights.reshape(rows, -1, _BLOCK)
    sums = blocks.sum(axis=-1)
    block = _choose_column(sums, uniforms[:, :1])
    inside = mx.take_along_axis(blocks, block[..., None], axis=1).squeeze(1)
    column = _choose_column(inside, uniforms[:, 1:])
    chance = mx.take_along_axis(inside, column, axis=-1) / sums.sum(axis=-1, keepdims=True)
    return (block * _BLOCK + column).squeeze(-1), mx.log(chance).squeeze(-1)


def _choose_column(
    weights: Float[mx.array, "rows columns"], uniforms: Float[mx.array, "rows 1"]
) -> UInt32[mx.array, "rows 1"]:
    """Return the first column whose cumulative share of the weight exceeds the uniform number."""
    # A parallel cumulative sum may rise by rounding at a column of weight 0: never choose one.
    cumulative = mx.where(weights > 0, mx.cumsum(weights, axis=-1), 0)
    exceeds = cumulative > uniforms * cumulative.max(axis=-1, keepdims=True)
    return mx.argmax(exceeds, axis=-1, keepdims=True)

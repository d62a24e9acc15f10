"""Sampling one token for each row with the row's own random key, and its log-probability."""

import hashlib
from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from jaxtyping import Float, UInt32
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p, make_repetition_penalty

from textpolicy.fast_cpu.exponential import exp
from textpolicy.types import Sampling

_BLOCK = 128


def random_keys(seed: int, rows: Sequence[tuple[int, int]]) -> UInt32[np.ndarray, "rows 2"]:
    """Return a random key for each (prompt, member), independent of the rest of the batch."""
    digests = [hashlib.blake2b(f"{seed}/{p}/{m}".encode(), digest_size=8) for p, m in rows]
    return np.frombuffer(b"".join(d.digest() for d in digests), np.uint32).reshape(-1, 2)


def draw_tokens(
    logits: Float[mx.array, "rows vocab"], keys: UInt32[mx.array, "rows 2"], sampling: Sampling
) -> tuple[UInt32[mx.array, " rows"], Float[mx.array, " rows"]]:
    """Return a token for each row, and its log-probability under the distribution it is from."""
    if sampling.temperature == 0:
        return mx.argmax(logits, axis=-1), mx.zeros(logits.shape[0])
    logits = logits.astype(mx.float32) / sampling.temperature
    if sampling.top_k and sampling.top_k < logits.shape[-1]:
        logits = apply_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        logits = apply_top_p(logits, sampling.top_p)
    if sampling.min_p:
        logits = apply_min_p(logits, sampling.min_p)
    weights = exp(logits - logits.max(axis=-1, keepdims=True))
    uniforms = mx.vmap(lambda key: mx.random.uniform(shape=(2,), key=key))(keys)
    return _choose_tokens(weights, uniforms)


def penalise_repetition(
    logits: Float[mx.array, "rows vocab"], contexts: Sequence[Sequence[int]], penalty: float
) -> Float[mx.array, "rows vocab"]:
    """Return the logits with the tokens of each row's recent context made less likely."""
    process = make_repetition_penalty(penalty)
    rows = [
        process(mx.array(list(context)), logits[row : row + 1])
        for row, context in enumerate(contexts)
    ]
    return mx.concatenate(rows, axis=0)


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

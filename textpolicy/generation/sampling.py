"""Drawing one token a row, each row with its own key, and the log-probability of each draw."""

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
    """One random key for each (prompt, member), the same whatever else is in the batch."""
    digests = [hashlib.blake2b(f"{seed}/{p}/{m}".encode(), digest_size=8) for p, m in rows]
    return np.frombuffer(b"".join(d.digest() for d in digests), np.uint32).reshape(-1, 2)


def draw(
    logits: Float[mx.array, "rows vocab"], keys: UInt32[mx.array, "rows 2"], sampling: Sampling
) -> tuple[UInt32[mx.array, " rows"], Float[mx.array, " rows"]]:
    """A token for each row, and its log-probability under the distribution it was drawn from."""
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
    return _choose(weights, mx.vmap(_two_uniforms)(keys))


def penalise_repetition(
    logits: Float[mx.array, "rows vocab"], contexts: Sequence[Sequence[int]], penalty: float
) -> Float[mx.array, "rows vocab"]:
    """Logits with the tokens of each row's recent context made less likely."""
    process = make_repetition_penalty(penalty)
    rows = [
        process(mx.array(list(context)), logits[row : row + 1])
        for row, context in enumerate(contexts)
    ]
    return mx.concatenate(rows, axis=0)


def _choose(
    weights: Float[mx.array, "rows vocab"], uniforms: Float[mx.array, "rows 2"]
) -> tuple[UInt32[mx.array, " rows"], Float[mx.array, " rows"]]:
    """A token of each row with a chance in proportion to its weight, and the log of that chance.

    The first number chooses a block of neighbours, the second one of them. Sums over the whole
    vocabulary would lose rare tokens to rounding; noise for every token, which needs no sums, is
    most of the work of a step where the vocabulary is large.
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
    """The first column whose cumulated weight is above that share; never one of weight 0."""
    # Sums of a parallel scan need not rise where a weight is 0.
    cumulated = mx.where(weights > 0, mx.cumsum(weights, axis=-1), 0)
    above = cumulated > uniforms * cumulated.max(axis=-1, keepdims=True)
    return mx.argmax(above, axis=-1, keepdims=True)


def _two_uniforms(key: mx.array) -> mx.array:
    return mx.random.uniform(shape=(2,), key=key)

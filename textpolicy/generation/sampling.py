"""Drawing one token a row, each row with its own key, and the log-probability of each draw."""

import hashlib
from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from jaxtyping import Float, UInt32
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p, make_repetition_penalty

from textpolicy.types import Sampling


def row_keys(seed: int, rows: Sequence[tuple[int, int]]) -> UInt32[np.ndarray, "rows 2"]:
    """One random key for each (prompt, member), the same whatever else is in the batch."""
    digests = [hashlib.blake2b(f"{seed}/{p}/{m}".encode(), digest_size=8) for p, m in rows]
    return np.frombuffer(b"".join(d.digest() for d in digests), np.uint32).reshape(-1, 2)


def draw(
    logits: Float[mx.array, "rows vocab"], keys: UInt32[mx.array, "rows 2"], sampling: Sampling
) -> tuple[UInt32[mx.array, " rows"], Float[mx.array, " rows"]]:
    """A token for each row, and its log-probability under the distribution it was drawn from."""
    if sampling.temperature == 0:
        return mx.argmax(logits, axis=-1), mx.zeros(logits.shape[0])
    logp = _log_softmax(logits.astype(mx.float32) / sampling.temperature)
    if sampling.top_k and sampling.top_k < logits.shape[-1]:
        logp = _log_softmax(apply_top_k(logp, sampling.top_k))
    if sampling.top_p < 1:
        logp = _log_softmax(apply_top_p(logp, sampling.top_p))
    if sampling.min_p:
        logp = _log_softmax(apply_min_p(logp, sampling.min_p))
    tokens = mx.vmap(_categorical)(logp, keys)
    return tokens, mx.take_along_axis(logp, tokens[:, None], axis=-1).squeeze(-1)


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


def _categorical(logp: mx.array, key: mx.array) -> mx.array:
    return mx.random.categorical(logp, key=key)


def _log_softmax(logits: Float[mx.array, "rows vocab"]) -> Float[mx.array, "rows vocab"]:
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)

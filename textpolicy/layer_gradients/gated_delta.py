"""The gated delta rule in chunks: the recurrence of Qwen3.5, Qwen3-Next, Kimi-Linear and others.

    Yang et al. 2024, Gated Delta Networks, arXiv:2412.06464; chunks: arXiv:2406.06484.

With the decay g (a number, or one for each key dimension), the rate b and the state S:

    S' = S diag(g)        d = b (v - S' k)        S <- S' + d k^T        y = S q

In a chunk, let G be the decay since its start and R[t, s] the decay after step s up to step t. All
d of the chunk solve one triangular system, of which the sequential rule is the forward
substitution:

    d[t] + b[t] sum_{s<t} (k[t] R[t, s] k[s]) d[s] = b[t] (v[t] - S G[t] k[t])
    y[t] = S G[t] q[t] + sum_{s<=t} (q[t] R[t, s] k[s]) d[s]

The backward pass keeps one state for each chunk and computes the chunk again. Decays are handled
as logarithms and never divided, so a decay that underflows to 0 has a finite gradient.
"""

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Bool, Float

from textpolicy.layer_gradients.recurrence import run_recurrence

KeyHeads = Float[mx.array, "batch time key_heads key_width"]
ValueHeads = Float[mx.array, "batch time heads value_width"]
HeadRates = Float[mx.array, "batch time heads"]
State = Float[mx.array, "batch heads value_width key_width"]
LogDecay = Float[mx.array, "batch time heads"] | Float[mx.array, "batch time heads key_width"]

# Steps of a chunk. With a decay for each key dimension, a chunk has an array of
# steps x steps x dimensions, so it is shorter.
_STEPS = 64
_STEPS_OF_VECTOR_DECAY = 16


def gated_delta_update(
    q: KeyHeads,
    k: KeyHeads,
    v: ValueHeads,
    a: mx.array,
    b: HeadRates,
    A_log: mx.array,
    dt_bias: mx.array,
    state: State | None = None,
    mask: Bool[mx.array, "batch time"] | None = None,
    *,
    use_kernel: bool = True,
    lower_bound: float | None = None,
    allow_neg_eigval: bool = False,
) -> tuple[ValueHeads, State]:
    """Return what mlx-lm's function of this name returns, with a gradient on every device."""
    rate = mx.exp(A_log.astype(mx.float32))
    if lower_bound is None:
        log_decay = -rate * nn.softplus(a + dt_bias)
    else:
        log_decay = lower_bound * mx.sigmoid(rate * (a.astype(mx.float32) + dt_bias))
    beta = mx.sigmoid(b) * (2.0 if allow_neg_eigval else 1.0)
    return gated_delta_in_chunks(q, k, v, log_decay, beta, state, mask)


def gated_delta_in_chunks(
    q: KeyHeads,
    k: KeyHeads,
    v: ValueHeads,
    log_decay: LogDecay,
    beta: HeadRates,
    state: State | None = None,
    mask: Bool[mx.array, "batch time"] | None = None,
) -> tuple[ValueHeads, State]:
    """Return the outputs of all steps and the last state. Masked steps leave the state as it is."""
    batch, time, heads, _ = v.shape
    if state is None:
        state = mx.zeros((batch, heads, v.shape[-1], k.shape[-1]))
    if mask is not None:
        log_decay = mx.where(mask.reshape(batch, time, *[1] * (log_decay.ndim - 2)), log_decay, 0)
        beta = mx.where(mask[..., None], beta, 0)
    size = _STEPS if log_decay.ndim == 3 else _STEPS_OF_VECTOR_DECAY
    y, state = run_recurrence(_run_chunk, (q, k, v, log_decay, beta), state, size)
    return y.astype(q.dtype), state


def _run_chunk(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    log_decay: mx.array,
    beta: mx.array,
    state: mx.array,
) -> tuple[mx.array, mx.array]:
    """Return the outputs of a chunk and the state after it.

    Inside, arrays are (batch, key heads, value heads of a key head, steps, width). A decay for each
    head has the width 1.
    """
    groups = k.shape[2]
    q, k, v = (_steps_last(array, groups) for array in (q, k, v))
    beta = _steps_last(beta[..., None], groups)
    log_decay = _steps_last(log_decay if log_decay.ndim == 4 else log_decay[..., None], groups)
    before = state.astype(mx.float32).reshape(*v.shape[:3], *state.shape[-2:])
    since_start = mx.exp(mx.cumsum(log_decay, axis=-2))
    between = _decay_between_steps(log_decay)
    before_T = before.swapaxes(-1, -2)

    products = mx.tril(_decayed_products(k, k, between), -1)
    inverse = _inverse_of_unit_lower(beta * products)
    delta = inverse @ (beta * (v - (since_start * k) @ before_T))
    y = (since_start * q) @ before_T + mx.tril(_decayed_products(q, k, between)) @ delta
    to_end = delta.swapaxes(-1, -2) @ (between[..., -1, :, :] * k)
    after = before * since_start[..., -1:, :] + to_end
    return y.transpose(0, 3, 1, 2, 4).flatten(2, 3), after.reshape(state.shape)


def _steps_last(array: mx.array, groups: int) -> mx.array:
    """Return (batch, steps, heads, width) in the shape of a chunk's arrays, in float32."""
    batch, steps, _, width = array.shape
    grouped = array.reshape(batch, steps, groups, -1, width).astype(mx.float32)
    return grouped.transpose(0, 2, 3, 1, 4)


def _decay_between_steps(log_decay: mx.array) -> mx.array:
    """Return the decay after each step s up to each step t, with t before s; 1 if t <= s.

    Each sum starts at its own step. A difference of two sums since the start would lose the digits
    of all that decayed before.
    """
    steps = mx.arange(log_decay.shape[-2])
    later = (steps[:, None] > steps[None, :])[..., None]
    return mx.exp(mx.cumsum(mx.where(later, log_decay[..., None, :], 0), axis=-3))


def _decayed_products(left: mx.array, right: mx.array, between: mx.array) -> mx.array:
    """Return the products of row t of `left` and row s of `right`, decayed from s to t."""
    if between.shape[-1] == 1:
        return (left @ right.swapaxes(-1, -2)) * between.squeeze(-1)
    return (between * right[..., None, :, :] @ left[..., None]).squeeze(-1)


def _inverse_of_unit_lower(lower: mx.array) -> mx.array:
    """Return the inverse of 1 + `lower`, which has zeros on and above its diagonal.

    Blocks of the diagonal are inverted in pairs, each pair with the part below it:

        inverse of [[A, 0], [B, D]] = [[A^-1, 0], [-D^-1 B A^-1, D^-1]]

    This takes matrix products only, which run on every device, and is as stable as substitution.
    """
    size = lower.shape[-1]
    place = mx.arange(size)
    inverse = mx.eye(size)
    width = 1
    while width < size:
        block = place // width
        pair = (block[:, None] == block[None, :] + 1) & (block[:, None] % 2 == 1)
        inverse = inverse - inverse @ mx.where(pair, lower, 0) @ inverse
        width *= 2
    return inverse

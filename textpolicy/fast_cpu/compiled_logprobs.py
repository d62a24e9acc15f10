"""Log-probabilities of tokens as one operation, on a Linux CPU.

mlx computes them by a dozen operations, each of which reads and writes an array as large as the
logits. The functions of `token_logprobs.c` read the logits once. With an output head that is a
matrix, logits exist for one chunk of rows only, in memory that is used again for their slopes.
"""

import mlx.core as mx
from jaxtyping import Float, Int

from textpolicy.fast_cpu.mlx_operations import compiled_operation, reason_of_none

_Logits = Float[mx.array, "positions vocabulary"]
_Hidden = Float[mx.array, "positions width"]
_Matrix = Float[mx.array, "vocabulary width"]
_Positions = Float[mx.array, " positions"]
_Tokens = Int[mx.array, " positions"]


def are_possible(*arrays: mx.array | None) -> bool:
    """Return whether these functions take such logits, or such hidden states and matrix."""
    if any(one is None or one.ndim != 2 or one.dtype != mx.float32 for one in arrays):
        return False
    if mx.default_device().type != mx.cpu or reason_of_none():
        return False
    return all(one is not None and one.size for one in arrays)


def of_tokens(
    logits: _Logits, tokens: _Tokens, temperature: _Positions
) -> tuple[_Positions, _Positions]:
    """Return log softmax(logits / temperature) of each row's token, and the entropies."""
    operation = compiled_operation("logprobs_of_logits", 3, 2)
    arrays = logits, temperature.astype(mx.float32), tokens.astype(mx.int32)
    logp, entropy = operation(arrays, [tokens.shape] * 2, logits.shape)
    return logp, entropy


def of_hidden(
    hidden: _Hidden, matrix: _Matrix, tokens: _Tokens, temperature: _Positions, rows: int
) -> tuple[_Positions, _Positions]:
    """Return these values of the logits hidden @ matrix.T, for so many rows at a time."""
    logp, entropy = _of_hidden(hidden, matrix, tokens, temperature, rows, with_slopes=False)
    return logp, entropy


def of_hidden_with_slopes(
    hidden: _Hidden, matrix: _Matrix, tokens: _Tokens, temperature: _Positions, rows: int
) -> tuple[_Positions, _Positions, _Hidden]:
    """Return these values, and the slopes of the log-probabilities by the hidden states."""
    logp, entropy, slopes = _of_hidden(hidden, matrix, tokens, temperature, rows, with_slopes=True)
    return logp, entropy, slopes


def _of_hidden(
    hidden: _Hidden,
    matrix: _Matrix,
    tokens: _Tokens,
    temperature: _Positions,
    most: int,
    *,
    with_slopes: bool,
) -> list[mx.array]:
    rows, inner = hidden.shape
    width = len(matrix)
    # Chunks of about the same size: a product of a few last rows is slow.
    chunk = -(-rows // -(-rows // most))
    shapes = [(rows,), (rows,), *[(rows, inner)] * with_slopes, (chunk, width)]
    operation = compiled_operation("logprobs_of_hidden", 4, len(shapes))
    arrays = hidden, matrix, temperature.astype(mx.float32), tokens.astype(mx.int32)
    numbers = rows, inner, width, chunk, int(with_slopes)
    return operation(arrays, shapes, numbers)[:-1]

"""Log-probabilities of whole sequences, the plain way: what shorter ways are compared with."""

import mlx.core as mx
import mlx.nn as nn

from textpolicy.training.token_logprobs import logprobs_from_logits


def token_logprobs(
    model: nn.Module, tokens: mx.array, temperature: mx.array
) -> tuple[mx.array, mx.array]:
    """Return log-probability and entropy of each token; the first token has no predecessor, so 0.

    `tokens` is (batch, time), and `temperature` has one number for each row.
    """
    logits = model(tokens[:, :-1])
    rows, time, vocabulary = logits.shape
    values = logprobs_from_logits(
        logits.reshape(-1, vocabulary), tokens[:, 1:].flatten(), mx.repeat(temperature, time)
    )
    logp, entropy = (x.reshape(rows, time) for x in values)
    return mx.pad(logp, [(0, 0), (1, 0)]), mx.pad(entropy, [(0, 0), (1, 0)])

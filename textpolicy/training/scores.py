"""The log-probability of a drawn token and the entropy it was drawn with, from logits."""

from typing import Any

import mlx.core as mx
from jaxtyping import Float, Int

PositionScores = tuple[Float[mx.array, " positions"], Float[mx.array, " positions"]]
"""Each position's log-probability of its token, and the entropy of its distribution."""


def score_logits(
    logits: Float[mx.array, "positions vocabulary"],
    tokens: Int[mx.array, " positions"],
    temperature: Float[mx.array, " positions"],
) -> PositionScores:
    """In float32 whatever the model's dtype, with the gradient in closed form.

    With p the probabilities, H the entropy and z the scaled logits:

        d log p(token) / dz = onehot(token) - p        dH / dz = -p (log p + H)
    """
    heat = temperature[:, None]

    def log_probabilities(logits: mx.array) -> mx.array:
        scaled = logits.astype(mx.float32) / heat
        return scaled - mx.logsumexp(scaled, axis=-1, keepdims=True)

    def forward(logits: mx.array) -> PositionScores:
        logp = log_probabilities(logits)
        drawn = mx.take_along_axis(logp, tokens[:, None], axis=-1)
        return drawn[:, 0], -mx.sum(mx.exp(logp) * logp, axis=-1)

    def backward(logits: mx.array, cotangents: PositionScores, scores: PositionScores) -> mx.array:
        of_drawn, of_entropy = cotangents[0][:, None] / heat, cotangents[1][:, None] / heat
        logp = log_probabilities(logits)
        slope = mx.exp(logp) * (of_drawn + of_entropy * (logp + scores[1][:, None]))
        at_token = slope.at[mx.arange(len(tokens)), tokens]
        return -at_token.subtract(of_drawn[:, 0]).astype(logits.dtype)

    run: Any = mx.custom_function(forward)
    run.vjp(backward)
    return run(logits)

"""The log-probability of a drawn token and the entropy it was drawn with, from logits."""

from typing import Any, NamedTuple

import mlx.core as mx
from jaxtyping import Float, Int

from textpolicy.fast_cpu.exponential import exp

PositionLogprobs = tuple[Float[mx.array, " positions"], Float[mx.array, " positions"]]
"""Each position's log-probability of its token, and the entropy of its distribution."""
Logits = Float[mx.array, "positions vocabulary"]


class Softmax(NamedTuple):
    """A distribution at each position, in float32 whatever the model's dtype.

    The exponential is what costs, so it is taken once: with s = logits / T - max and e = exp(s),

        log p(token) = s(token) - log sum e        H = log sum e - sum(e s) / sum e
    """

    shifted: Logits
    exponential: Logits
    total: Float[mx.array, "positions 1"]

    @classmethod
    def of(cls, logits: Logits, temperature: Float[mx.array, " positions"]) -> "Softmax":
        """softmax(logits / temperature)."""
        scaled = logits.astype(mx.float32) / temperature[:, None]
        shifted = scaled - scaled.max(axis=-1, keepdims=True)
        exponential = exp(shifted)
        return cls(shifted, exponential, exponential.sum(axis=-1, keepdims=True))

    def logprobs(self, tokens: Int[mx.array, " positions"]) -> PositionLogprobs:
        """Of these tokens, and of the distributions."""
        drawn = mx.take_along_axis(self.shifted, tokens[:, None], axis=-1)
        mean = (self.exponential * self.shifted).sum(axis=-1) / self.total[:, 0]
        normaliser = mx.log(self.total)[:, 0]
        return drawn[:, 0] - normaliser, normaliser - mean

    @property
    def probabilities(self) -> Logits:
        """Of every token."""
        return self.exponential / self.total


def logprobs_from_logits(
    logits: Logits,
    tokens: Int[mx.array, " positions"],
    temperature: Float[mx.array, " positions"],
) -> PositionLogprobs:
    """Scores under softmax(logits / temperature), with the gradient in closed form.

    With p the probabilities, H the entropy and z the scaled logits:

        d log p(token) / dz = onehot(token) - p        dH / dz = -p (log p + H)
    """

    def forward(logits: mx.array) -> PositionLogprobs:
        return Softmax.of(logits, temperature).logprobs(tokens)

    def backward(
        logits: mx.array, cotangents: PositionLogprobs, outputs: PositionLogprobs
    ) -> mx.array:
        of_drawn, of_entropy = (c[:, None] / temperature[:, None] for c in cotangents)
        now = Softmax.of(logits, temperature)
        log_p = now.shifted - mx.log(now.total)
        slope = now.probabilities * (of_drawn + of_entropy * (log_p + outputs[1][:, None]))
        at_token = slope.at[mx.arange(len(tokens)), tokens]
        return -at_token.subtract(of_drawn[:, 0]).astype(logits.dtype)

    run: Any = mx.custom_function(forward)
    run.vjp(backward)
    return run(logits)

"""Log-probabilities and entropies of a softmax over logits."""

from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
from jaxtyping import Float, Int

from textpolicy.fast_cpu.exponential import exp

PositionLogprobs = tuple[Float[mx.array, " positions"], Float[mx.array, " positions"]]
"""Of each position: the log-probability of its token, and the entropy of its distribution."""
Logits = Float[mx.array, "positions vocabulary"]


class Softmax(NamedTuple):
    """The distribution at each position, in float32 for every dtype of the model.

    The exponential is the expensive part, so it is computed once. With s = logits / T - max and
    e = exp(s):

        log p(token) = s(token) - log sum e        H = log sum e - sum(e s) / sum e
    """

    shifted: Logits
    exponential: Logits
    total: Float[mx.array, "positions 1"]

    @classmethod
    def of(cls, logits: Logits, temperature: Float[mx.array, " positions"]) -> "Softmax":
        """Return softmax(logits / temperature)."""
        scaled = logits.astype(mx.float32) / temperature[:, None]
        shifted = scaled - scaled.max(axis=-1, keepdims=True)
        exponential = exp(shifted)
        return cls(shifted, exponential, exponential.sum(axis=-1, keepdims=True))

    def logprobs(self, tokens: Int[mx.array, " positions"]) -> PositionLogprobs:
        """Return the log-probabilities of `tokens` and the entropies."""
        drawn = mx.take_along_axis(self.shifted, tokens[:, None], axis=-1)
        mean = (self.exponential * self.shifted).sum(axis=-1) / self.total[:, 0]
        normaliser = mx.log(self.total)[:, 0]
        return drawn[:, 0] - normaliser, normaliser - mean

    @property
    def probabilities(self) -> Logits:
        """The probability of every token of the vocabulary."""
        return self.exponential / self.total


def logprobs_from_logits(
    logits: Logits, tokens: Int[mx.array, " positions"], temperature: Float[mx.array, " positions"]
) -> PositionLogprobs:
    """Return log-probabilities and entropies under softmax(logits / temperature).

    The gradient is computed in closed form. With the probabilities p, the entropy H and the
    scaled logits z:

        d log p(token) / dz = onehot(token) - p        dH / dz = -p (log p + H)
    """
    run: Any = mx.custom_function(lambda logits: Softmax.of(logits, temperature).logprobs(tokens))
    run.vjp(partial(_logits_gradient, tokens, temperature))
    return run(logits)


def _logits_gradient(
    tokens: Int[mx.array, " positions"],
    temperature: Float[mx.array, " positions"],
    logits: Logits,
    cotangents: PositionLogprobs,
    outputs: PositionLogprobs,
) -> Logits:
    of_logp, of_entropy = (c[:, None] / temperature[:, None] for c in cotangents)
    softmax = Softmax.of(logits, temperature)
    log_p = softmax.shifted - mx.log(softmax.total)
    slope = softmax.probabilities * (of_logp + of_entropy * (log_p + outputs[1][:, None]))
    at_token = slope.at[mx.arange(len(tokens)), tokens]
    return -at_token.subtract(of_logp[:, 0]).astype(logits.dtype)

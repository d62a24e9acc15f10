"""Log-probabilities of tokens under the softmax of their logits, with a gradient in closed form."""

from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
from jaxtyping import Float, Int

from textpolicy.fast_cpu import compiled_logprobs
from textpolicy.fast_cpu.exponential import exp

# Numbers that are added one after another.
_BLOCK = 128
PositionLogprobs = tuple[Float[mx.array, " positions"], Float[mx.array, " positions"]]
"""Of each position: the log-probability of its token, and the entropy of its distribution."""
Logits = Float[mx.array, "positions vocabulary"]


def logprobs_from_logits(
    logits: Logits, tokens: Int[mx.array, " positions"], temperature: Float[mx.array, " positions"]
) -> PositionLogprobs:
    """Return log-probabilities and entropies under softmax(logits / temperature).

    The gradient is computed in closed form. With the probabilities p, the entropy H and the
    scaled logits z:

        d log p(token) / dz = onehot(token) - p        dH / dz = -p (log p + H)
    """

    def values(logits: Logits) -> PositionLogprobs:
        known = logits.astype(mx.float32)
        if compiled_logprobs.are_possible(known):
            return compiled_logprobs.of_tokens(known, tokens, temperature)
        return Softmax.of(logits, temperature).logprobs(tokens)

    run: Any = mx.custom_function(values)
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
        return cls(shifted, exponential, sum_over_vocabulary(exponential)[:, None])

    def logprobs(self, tokens: Int[mx.array, " positions"]) -> PositionLogprobs:
        """Return the log-probabilities of `tokens` and the entropies."""
        drawn = mx.take_along_axis(self.shifted, tokens[:, None], axis=-1)
        mean = sum_over_vocabulary(self.exponential * self.shifted) / self.total[:, 0]
        normaliser = mx.log(self.total)[:, 0]
        return drawn[:, 0] - normaliser, normaliser - mean

    @property
    def probabilities(self) -> Logits:
        """The probability of every token of the vocabulary."""
        return self.exponential / self.total


def sum_over_vocabulary(values: Logits) -> Float[mx.array, " positions"]:
    """Return the sum of each row, computed from the sums of short blocks.

    On a CPU, mlx adds the numbers of a row one after another. With 150,000 small numbers, rounding
    then changes the logarithm of the sum by 2e-4, always in the same direction.
    """
    positions, vocabulary = values.shape
    blocks = vocabulary // _BLOCK
    whole = values[:, : blocks * _BLOCK].reshape(positions, blocks, _BLOCK)
    return whole.sum(axis=-1).sum(axis=-1) + values[:, blocks * _BLOCK :].sum(axis=-1)

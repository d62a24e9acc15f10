"""The last layer of a language model, applied to the positions that count and a few at a time.

Logits of a whole batch are often its largest array. Here they exist for a chunk of positions only,
in the forward pass and, computed again, in the backward pass.
"""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Float, Int
from mlx.nn.utils import checkpoint

# Of float32 logits alive at once; softmax and gradient take a few times as much.
CHUNK_BYTES = 32 * 2**20

PositionScores = tuple[Float[mx.array, " positions"], Float[mx.array, " positions"]]
"""Each position's log-probability of its token, and the entropy of its distribution."""


@dataclass(frozen=True)
class Head:
    """A model cut in two: `body` gives hidden states, `project` makes logits of them."""

    model: Any
    tied: bool

    @property
    def body(self) -> nn.Module:
        """What runs before the head."""
        return self.model.model

    @property
    def weights(self) -> Any:
        """The head's module; a tied head is the embedding, used the other way round."""
        return self.body.embed_tokens if self.tied else self.model.lm_head

    def project(self, hidden: Float[mx.array, "*batch width"]) -> Float[mx.array, "*batch vocab"]:
        """Logits of hidden states."""
        return self.weights.as_linear(hidden) if self.tied else self.weights(hidden)

    def score(
        self,
        hidden: Float[mx.array, "positions width"],
        tokens: Int[mx.array, " positions"],
        temperature: Float[mx.array, " positions"],
        *,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> PositionScores:
        """Scores under softmax(logits / temperature), a chunk of positions in memory at a time."""
        vocabulary = self.project(hidden[:1]).shape[-1]
        size = max(1, chunk_bytes // (4 * vocabulary))
        if len(tokens) <= size:
            return score_logits(self.project(hidden), tokens, temperature)
        run = checkpoint(self.weights, lambda h, ids, t: score_logits(self.project(h), ids, t))
        parts = [
            run(hidden[at : at + size], tokens[at : at + size], temperature[at : at + size])
            for at in range(0, len(tokens), size)
        ]
        return mx.concatenate([p for p, _ in parts]), mx.concatenate([e for _, e in parts])


def score_logits(
    logits: Float[mx.array, "positions vocabulary"],
    tokens: Int[mx.array, " positions"],
    temperature: Float[mx.array, " positions"],
) -> PositionScores:
    """In float32 whatever the model's dtype."""
    logits = logits.astype(mx.float32) / temperature[:, None]
    logp = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    drawn = mx.take_along_axis(logp, tokens[:, None], axis=-1)
    return drawn[:, 0], -mx.sum(mx.exp(logp) * logp, axis=-1)


def find_head(model: nn.Module) -> Head | None:
    """The model's body and head; None where its logits are more than a projection.

    Some models scale or cap their logits, and some keep their parts under other names: a forward
    pass on two tokens tells.
    """
    inner: Any = model.language_model if "language_model" in model else model
    if "model" not in inner or not ("lm_head" in inner or "embed_tokens" in inner.model):
        return None
    head = Head(inner, tied="lm_head" not in inner)
    tokens = mx.array([[1, 2]])
    hidden, logits = head.body(tokens), model(tokens)
    if not isinstance(hidden, mx.array):
        return None
    return head if mx.array_equal(head.project(hidden), logits) else None

"""The last layer of a language model, applied to the positions that count and a few at a time.

Logits of a whole batch are often its largest array. Here they exist for a chunk of positions only:
once if the head is frozen, and a second time in the backward pass if it is trained.
"""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Float, Int

from textpolicy.training.chunked_gradient import apply_in_chunks
from textpolicy.training.frozen_output_head import (
    frozen_head_logprobs,
    frozen_head_logprobs_without_gradient,
)
from textpolicy.training.softmax_logprobs import PositionLogprobs, logprobs_from_logits

# Of float32 logits. What softmax and gradient make of a chunk, and what mlx allocates ahead for the
# next, come to about twelve times as much.
CHUNK_BYTES = 16 * 2**20


@dataclass(frozen=True)
class OutputHead:
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

    def logprobs(
        self,
        hidden: Float[mx.array, "positions width"],
        tokens: Int[mx.array, " positions"],
        temperature: Float[mx.array, " positions"],
        *,
        differentiable: bool = True,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> PositionLogprobs:
        """Scores under softmax(logits / temperature), a chunk of positions in memory at a time.

        A frozen head is quicker if it is told that no gradient will be asked for.
        """
        vocabulary = self.project(hidden[:1]).shape[-1]
        size = max(1, chunk_bytes // (4 * vocabulary))
        places = [slice(at, at + size) for at in range(0, len(tokens), size)]
        weights = self.weights.trainable_parameters()
        if not weights:
            score = (
                frozen_head_logprobs if differentiable else frozen_head_logprobs_without_gradient
            )
            return score(self.project, hidden, tokens, temperature, places)
        if len(places) == 1:
            return logprobs_from_logits(self.project(hidden), tokens, temperature)

        def score_chunk(place: slice, hidden: mx.array, weights: Any) -> PositionLogprobs:
            self.weights.update(weights)
            return logprobs_from_logits(self.project(hidden), tokens[place], temperature[place])

        scores = apply_in_chunks(score_chunk, places)(hidden, weights)
        self.weights.update(weights)
        return scores


def find_output_head(model: nn.Module) -> OutputHead | None:
    """The model's body and head; None where its logits are more than a projection.

    Some models scale or cap their logits, and some keep their parts under other names: a forward
    pass on two tokens tells.
    """
    inner: Any = model.language_model if "language_model" in model else model
    if "model" not in inner or not ("lm_head" in inner or "embed_tokens" in inner.model):
        return None
    head = OutputHead(inner, tied="lm_head" not in inner)
    tokens = mx.array([[1, 2]])
    hidden, logits = head.body(tokens), model(tokens)
    if not isinstance(hidden, mx.array):
        return None
    return head if mx.array_equal(head.project(hidden), logits) else None

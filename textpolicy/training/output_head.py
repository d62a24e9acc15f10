"""The output head of a language model, and the log-probabilities of its tokens, in chunks.

The logits of a whole batch are often its largest array. Here, logits exist for one chunk only.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Float, Int
from mlx.utils import tree_flatten, tree_unflatten

from textpolicy.adapters.quantization.stored_weights import unpacked_product
from textpolicy.device_sizes import device_sizes
from textpolicy.fast_cpu import compiled_logprobs
from textpolicy.fast_cpu.array_slices import compute_after
from textpolicy.training.token_logprobs import (
    PositionLogprobs,
    Softmax,
    logprobs_from_logits,
)

# A compiled function takes the memory of a chunk's logits once, mlx takes it a dozen times. So the
# function gets larger chunks, and there are fewer products, each of which reads all weights.
COMPILED_CHUNK = 4
ChunkFunction = Callable[[slice, mx.array, Any], PositionLogprobs]
"""Takes the slice of a chunk, the rows of this slice, and a tree of weights."""


@dataclass(frozen=True)
class OutputHead:
    """A model in two parts: `body` computes hidden states, `project` computes their logits."""

    model: Any
    tied: bool

    @property
    def body(self) -> nn.Module:
        """The model without its output head."""
        return self.model.model

    @property
    def weights(self) -> Any:
        """The module of the output head, which is the embedding if the two are tied."""
        return self.body.embed_tokens if self.tied else self.model.lm_head

    def project(self, hidden: Float[mx.array, "*batch width"]) -> Float[mx.array, "*batch vocab"]:
        """Return the logits of hidden states."""
        return self.weights.as_linear(hidden) if self.tied else self.weights(hidden)

    def logprobs(
        self,
        hidden: Float[mx.array, "positions width"],
        tokens: Int[mx.array, " positions"],
        temperature: Float[mx.array, " positions"],
        *,
        differentiable: bool = True,
        chunk_bytes: int | None = None,
    ) -> PositionLogprobs:
        """Return log-probabilities and entropies under softmax(logits / temperature).

        `differentiable=False` is faster if the head is frozen and no gradient is needed. A chunk's
        float32 logits take `chunk_bytes`, by default those of `DeviceSizes`.
        """
        vocabulary = self.project(hidden[:1]).shape[-1]
        most = chunk_bytes or device_sizes().head_chunk_bytes
        size = max(1, most // (4 * vocabulary))
        chunks = [slice(at, at + size) for at in range(0, len(tokens), size)]
        weights = self.weights.trainable_parameters()
        if not weights:
            # Otherwise each chunk would unpack the weights of a quantized head again.
            project = unpacked_product(self.weights, len(tokens))
            plain = type(self.weights) in (nn.Linear, nn.Embedding)
            matrix = self.weights.weight if plain else project and project.weight
            if "bias" in self.weights or not compiled_logprobs.are_possible(hidden, matrix):
                matrix = None
            head = _FrozenHead(project or self.project, matrix, tokens, temperature, chunks)
            return head.logprobs(hidden) if differentiable else head.values(hidden)
        if len(chunks) == 1:
            return logprobs_from_logits(self.project(hidden), tokens, temperature)

        def chunk_logprobs(chunk: slice, hidden: mx.array, weights: Any) -> PositionLogprobs:
            self.weights.update(weights)
            return logprobs_from_logits(self.project(hidden), tokens[chunk], temperature[chunk])

        logprobs = apply_in_chunks(chunk_logprobs, chunks)(hidden, weights)
        self.weights.update(weights)
        return logprobs


def find_output_head(model: nn.Module) -> OutputHead | None:
    """Return the model's body and head, or None if its logits are more than a projection.

    Some models scale or cap their logits, and some name their parts differently. A forward pass on
    two tokens compares the logits.
    """
    inner: Any = model.language_model if "language_model" in model else model
    if "model" not in inner or not ("lm_head" in inner or "embed_tokens" in inner.model):
        return None
    head = OutputHead(inner, tied="lm_head" not in inner)
    if _takes_more_than_tokens(head.body):
        return None
    tokens = mx.array([[1, 2]])
    hidden, logits = head.body(tokens), model(tokens)
    if not isinstance(hidden, mx.array):
        return None
    return head if mx.array_equal(head.project(hidden), logits) else None


def _takes_more_than_tokens(body: nn.Module) -> bool:
    """Return whether the body requires another argument, as that of rwkv7 requires a cache."""
    _, *others = inspect.signature(body.__call__).parameters.values()
    return any(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in others)


@dataclass(frozen=True)
class _FrozenHead:
    """Log-probabilities under an output head without trainable weights.

    A loss depends on a position's logits through two numbers only. The backward pass needs their
    derivative by the hidden state, which is one vector for each position. The forward pass computes
    this vector while it has the logits, so logits are neither kept nor computed again.
    """

    project: Callable[[mx.array], mx.array]
    matrix: Float[mx.array, "vocabulary width"] | None
    tokens: Int[mx.array, " positions"]
    temperature: Float[mx.array, " positions"]
    chunks: list[slice]

    def values(self, hidden: Float[mx.array, "positions width"]) -> PositionLogprobs:
        """Return log-probabilities and entropies without a gradient."""
        if self.matrix is not None:
            return compiled_logprobs.of_hidden(hidden, *self._compiled_inputs)
        parts: list[PositionLogprobs] = []
        for chunk in self.chunks:
            logits = self.project(compute_after(hidden[chunk], parts[-1] if parts else ()))
            softmax = Softmax.of(logits, self.temperature[chunk])
            parts.append(softmax.logprobs(self.tokens[chunk]))
        return join_chunks(parts)

    def logprobs(self, hidden: Float[mx.array, "positions width"]) -> PositionLogprobs:
        """Return log-probabilities and entropies with a gradient in the hidden states."""
        constant = mx.stop_gradient(hidden)
        if self.matrix is not None:
            known = compiled_logprobs.of_hidden_with_slopes(constant, *self._compiled_inputs)
        else:
            known = self._in_chunks(constant)
        logp, entropy, slope = known
        return (
            _with_gradient(logp, hidden, lambda weight: weight[:, None] * slope),
            _with_gradient(entropy, hidden, partial(self._entropy_gradient, constant)),
        )

    @property
    def _compiled_inputs(self) -> tuple[mx.array, mx.array, mx.array, int]:
        assert self.matrix is not None
        chunk = self.chunks[0]
        rows = COMPILED_CHUNK * (chunk.stop - chunk.start)
        return self.matrix, self.tokens, self.temperature, rows

    def _in_chunks(self, hidden: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Return log-probabilities, entropies and the slopes of the first by the hidden states."""
        parts: list[tuple[mx.array, mx.array, mx.array]] = []
        for chunk in self.chunks:
            rows = compute_after(hidden[chunk], parts[-1] if parts else ())
            parts.append(self._with_slope(chunk, rows))
        logp, entropy, slope = (mx.concatenate([part[i] for part in parts]) for i in range(3))
        return logp, entropy, slope

    def _entropy_gradient(self, hidden: mx.array, weight: mx.array) -> mx.array:
        # Few losses use the entropy, so its gradient is computed only if needed.
        compute = apply_in_chunks(self._chunk_logprobs, self.chunks)
        return mx.vjp(lambda rows: compute(rows, {})[1], [hidden], [weight])[1][0]

    def _chunk_logprobs(self, chunk: slice, rows: mx.array, _: Any) -> PositionLogprobs:
        logits = self.project(rows)
        return logprobs_from_logits(logits, self.tokens[chunk], self.temperature[chunk])

    def _with_slope(self, chunk: slice, hidden: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Return log-probabilities, entropies and d log p(token) / d hidden of a chunk.

        The derivative is the transposed head applied to (onehot(token) - p) / temperature.
        """
        tokens, temperature = self.tokens[chunk], self.temperature[chunk]
        logits = self.project(hidden)
        softmax = Softmax.of(logits, temperature)
        others = -softmax.probabilities / temperature[:, None]
        direction = others.at[mx.arange(len(tokens)), tokens].add(1 / temperature)
        (slope,) = mx.vjp(self.project, [hidden], [direction.astype(logits.dtype)])[1]
        return (*softmax.logprobs(tokens), slope)


def _with_gradient(
    values: Float[mx.array, " positions"],
    hidden: Float[mx.array, "positions width"],
    gradient: Callable[[mx.array], mx.array],
) -> Float[mx.array, " positions"]:
    """Return the values, with this function as their gradient in the hidden states."""
    run: Any = mx.custom_function(lambda hidden: values)
    run.vjp(lambda hidden, weight, _: gradient(weight).astype(hidden.dtype))
    return run(hidden)


def apply_in_chunks(
    function: ChunkFunction, chunks: Sequence[slice]
) -> Callable[[mx.array, Any], PositionLogprobs]:
    """Return a function of all rows and the weights that computes one chunk after another.

    The backward pass computes each chunk again. Each chunk waits for the previous one, because mlx
    would otherwise start on many chunks at once and hold all of them in memory.
    """

    def forward(rows: mx.array, weights: Any) -> PositionLogprobs:
        parts: list[PositionLogprobs] = []
        for chunk in chunks:
            previous = [*parts[-1]] if parts else []
            parts.append(function(chunk, compute_after(rows[chunk], previous), weights))
        return join_chunks(parts)

    def backward(primals: Any, cotangents: PositionLogprobs, _: PositionLogprobs) -> Any:
        rows, weights = primals
        flat: Any = tree_flatten(weights)
        names, arrays = [name for name, _ in flat], [array for _, array in flat]
        parts: list[mx.array] = []
        sums = [mx.zeros_like(array) for array in arrays]
        for chunk in chunks:

            def compute(rows: mx.array, *arrays: mx.array, chunk: slice = chunk) -> Any:
                return function(chunk, rows, tree_unflatten([*zip(names, arrays, strict=True)]))

            inputs = [compute_after(rows[chunk], [*parts[-1:], *sums]), *arrays]
            gradients: Any = mx.vjp(compute, inputs, [c[chunk] for c in cotangents])[1]
            of_rows, *of_weights = gradients
            parts.append(of_rows)
            sums = [total + array for total, array in zip(sums, of_weights, strict=True)]
        return mx.concatenate(parts), tree_unflatten([*zip(names, sums, strict=True)])

    run: Any = mx.custom_function(forward)
    run.vjp(backward)
    return run


def join_chunks(parts: Sequence[tuple[mx.array, mx.array]]) -> PositionLogprobs:
    """Return the log-probabilities and the entropies of all chunks."""
    return mx.concatenate([logp for logp, _ in parts]), mx.concatenate([h for _, h in parts])

"""A head that does not move: its gradient is known as soon as its logits are.

The loss reaches a position's logits through two numbers only, so what the backward pass needs of
them is how these numbers change with the hidden state: one vector a position. It is computed while
the logits are there, and nobody has to keep or to compute them again.
"""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
from jaxtyping import Float, Int

from textpolicy.fast_cpu.array_slices import compute_after
from textpolicy.training.chunked_gradient import apply_in_chunks
from textpolicy.training.softmax_logprobs import PositionLogprobs, Softmax, logprobs_from_logits

Hidden = Float[mx.array, "positions width"]
Project = Callable[[mx.array], mx.array]


def frozen_head_logprobs(
    project: Project,
    hidden: Hidden,
    tokens: Int[mx.array, " positions"],
    temperature: Float[mx.array, " positions"],
    places: Sequence[slice],
) -> PositionLogprobs:
    """Scores with a gradient in the hidden states alone, one place in memory after another."""
    still = mx.stop_gradient(hidden)
    parts: list[tuple[mx.array, mx.array, mx.array]] = []
    for place in places:
        rows = compute_after(still[place], parts[-1] if parts else ())
        parts.append(_with_slope(project, rows, tokens[place], temperature[place]))
    logp, entropy, slope = (mx.concatenate([part[i] for part in parts]) for i in range(3))

    def again(place: slice, rows: mx.array, _: Any) -> PositionLogprobs:
        return logprobs_from_logits(project(rows), tokens[place], temperature[place])

    def entropy_gradient(weight: mx.array) -> mx.array:
        # Few losses have one, so its slope is computed where it is asked for.
        entropies = apply_in_chunks(again, places)
        return mx.vjp(lambda rows: entropies(rows, {})[1], [still], [weight])[1][0]

    return (
        _known(logp, hidden, lambda weight: (weight[:, None] * slope).astype(hidden.dtype)),
        _known(entropy, hidden, entropy_gradient),
    )


def frozen_head_logprobs_without_gradient(
    project: Project,
    hidden: Hidden,
    tokens: Int[mx.array, " positions"],
    temperature: Float[mx.array, " positions"],
    places: Sequence[slice],
) -> PositionLogprobs:
    """The same scores without a gradient."""
    parts: list[PositionLogprobs] = []
    for place in places:
        logits = project(compute_after(hidden[place], parts[-1] if parts else ()))
        parts.append(Softmax.of(logits, temperature[place]).logprobs(tokens[place]))
    return mx.concatenate([p for p, _ in parts]), mx.concatenate([e for _, e in parts])


def _with_slope(
    project: Project,
    hidden: Hidden,
    tokens: Int[mx.array, " positions"],
    temperature: Float[mx.array, " positions"],
) -> tuple[mx.array, mx.array, mx.array]:
    """Both scores, and d log p(token) / d hidden: the head's transpose of (onehot - p) / T."""
    logits = project(hidden)
    now = Softmax.of(logits, temperature)
    rest = -now.probabilities / temperature[:, None]
    direction = rest.at[mx.arange(len(tokens)), tokens].add(1 / temperature)
    (slope,) = mx.vjp(project, [hidden], [direction.astype(logits.dtype)])[1]
    return (*now.logprobs(tokens), slope)


def _known(
    values: Float[mx.array, " positions"],
    hidden: Hidden,
    gradient: Callable[[mx.array], mx.array],
) -> Float[mx.array, " positions"]:
    """The values, with this gradient in the hidden states."""
    run: Any = mx.custom_function(lambda hidden: values)
    run.vjp(lambda hidden, weight, _: gradient(weight))
    return run(hidden)

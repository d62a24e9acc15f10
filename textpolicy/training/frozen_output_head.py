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
from textpolicy.training.chunked_gradient import one_after_another
from textpolicy.training.softmax_logprobs import PositionScores, Softmax, score_logits

Hidden = Float[mx.array, "positions width"]
Project = Callable[[mx.array], mx.array]


def score_frozen(
    project: Project,
    hidden: Hidden,
    tokens: Int[mx.array, " positions"],
    temperature: Float[mx.array, " positions"],
    places: Sequence[slice],
) -> PositionScores:
    """Scores with a gradient in the hidden states alone, one place in memory after another."""
    still = mx.stop_gradient(hidden)
    parts: list[tuple[mx.array, mx.array, mx.array]] = []
    for place in places:
        rows = compute_after(still[place], parts[-1] if parts else ())
        parts.append(_with_slope(project, rows, tokens[place], temperature[place]))
    logp, entropy, slope = (mx.concatenate([part[i] for part in parts]) for i in range(3))

    def again(place: slice, rows: mx.array, _: Any) -> PositionScores:
        return score_logits(project(rows), tokens[place], temperature[place])

    def entropy_gradient(weight: mx.array) -> mx.array:
        # Few losses have one, so its slope is computed where it is asked for.
        entropies = one_after_another(again, places)
        return mx.vjp(lambda rows: entropies(rows, {})[1], [still], [weight])[1][0]

    return (
        _known(logp, hidden, lambda weight: (weight[:, None] * slope).astype(hidden.dtype)),
        _known(entropy, hidden, entropy_gradient),
    )


def score_only(
    project: Project,
    hidden: Hidden,
    tokens: Int[mx.array, " positions"],
    temperature: Float[mx.array, " positions"],
    places: Sequence[slice],
) -> PositionScores:
    """The same scores without a gradient."""
    parts: list[PositionScores] = []
    for place in places:
        logits = project(compute_after(hidden[place], parts[-1] if parts else ()))
        parts.append(Softmax.of(logits, temperature[place]).scores(tokens[place]))
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
    return (*now.scores(tokens), slope)


def _known(
    values: Float[mx.array, " positions"],
    hidden: Hidden,
    gradient: Callable[[mx.array], mx.array],
) -> Float[mx.array, " positions"]:
    """The values, with this gradient in the hidden states."""
    run: Any = mx.custom_function(lambda hidden: values)
    run.vjp(lambda hidden, weight, _: gradient(weight))
    return run(hidden)

"""A recurrence over time, computed chunk after chunk, with a backward pass in linear memory.

The backward pass keeps the state before each chunk and computes each chunk again. `mx.checkpoint`
would not do: mlx may compute all chunks again before the first backward step, and hold all of them.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx

RecurrentChunk = Callable[..., tuple[mx.array, mx.array]]
"""Takes the arrays of a chunk and the state before it; returns its outputs and the state after."""


def run_recurrence(
    chunk_function: RecurrentChunk, arrays: Sequence[mx.array], state: mx.array, steps: int
) -> tuple[mx.array, mx.array]:
    """Return the outputs of all time steps and the last state. The second axis is time."""

    def forward(arrays: Sequence[mx.array], state: mx.array) -> list[mx.array]:
        outputs: list[mx.array] = []
        states = [state]
        for chunk in _split_time(arrays, steps):
            y, state = chunk_function(*mx.depends([*chunk], [state]), state)
            outputs.append(y)
            states.append(state)
        return [mx.concatenate(outputs, axis=1), *reversed(states)]

    def backward(primals: Any, cotangents: list[mx.array], results: list[mx.array]) -> Any:
        of_outputs, of_state, *_ = cotangents
        _, _, *states = results
        chunks = [*_split_time([*primals[0], of_outputs], steps)]
        gradients: list[list[mx.array]] = []
        for (*chunk, of_chunk), before in zip(reversed(chunks), states, strict=True):
            inputs = mx.depends([*chunk, before], [of_state])
            *of_arrays, of_state = mx.vjp(chunk_function, inputs, [of_chunk, of_state])[1]
            gradients.insert(0, of_arrays)
        return [
            mx.concatenate([*parts], axis=1) for parts in zip(*gradients, strict=True)
        ], of_state

    run: Any = mx.custom_function(forward)
    run.vjp(backward)
    outputs, last, *_ = run(list(arrays), state)
    return outputs, last


def _split_time(arrays: Sequence[mx.array], steps: int) -> Iterator[tuple[mx.array, ...]]:
    """Yield all arrays cut into parts of at most `steps` steps."""
    ends = [*range(steps, arrays[0].shape[1], steps)]
    return zip(*(mx.split(array, ends, axis=1) for array in arrays), strict=True)

"""Forward passes on batches: each group's prompt once, or each row with its prompt.

Keys and values of a shared prompt are prepended to those of each completion. They are
differentiable, so gradients equal those of the forward pass on whole rows.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Bool, Float, Int
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import make_prompt_cache

from textpolicy.types import Batch

TokenOutputs = Float[mx.array, "batch time width"]
"""The hidden state, or the logits, at the position that predicts each token of a batch."""


def run_with_shared_prompts(
    network: Callable[..., mx.array], model: nn.Module, batch: Batch
) -> TokenOutputs:
    """Return the network's outputs for all completions, with one forward pass for each prompt."""
    # The last prompt token predicts the first token of a completion, so it is run with completions.
    length = batch.prompt_lengths[batch.owner] - 1
    cache = None
    if batch.prompts.shape[1] > 1:
        recorded = [_PromptRecorder() for _ in make_prompt_cache(model)]
        network(batch.prompts[:, :-1], cache=recorded)
        width = batch.prompts.shape[1] - 1
        padded = bool((length < width).any())
        cache = [_PromptPrefix(layer, batch.owner, length, padded) for layer in recorded]
    last = batch.prompts[batch.owner, length]
    inputs = mx.concatenate([last[:, None], batch.tokens[:, :-1]], axis=1)
    return network(inputs, cache=cache)


def run_whole_rows(network: Callable[..., mx.array], batch: Batch) -> TokenOutputs:
    """Return the network's outputs for models whose state is more than keys and values."""
    length = batch.prompt_lengths[batch.owner][:, None]
    width, time = batch.prompts.shape[1], batch.tokens.shape[1]
    position = mx.broadcast_to(mx.arange(width + time - 1), (len(length), width + time - 1))
    prompts = mx.pad(batch.prompts[batch.owner], [(0, 0), (0, time - 1)])
    own = mx.take_along_axis(batch.tokens, mx.clip(position - length, 0, time - 1), axis=1)
    outputs = network(mx.where(position < length, prompts, own))
    window = mx.arange(time)[None, :] + length - 1
    return mx.take_along_axis(outputs, window[..., None], axis=1)


class _PromptRecorder:
    """In place of a layer's KV cache: records the keys and values of all prompts."""

    offset = 0
    state: tuple[mx.array, mx.array] | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.state = keys, values
        return self.state

    def make_mask(self, time: int, *, return_array: bool = False, **_: Any) -> Any:
        if return_array:
            return create_causal_mask(time)
        return "causal" if time > 1 else None


class _PromptPrefix:
    """In place of a layer's KV cache: prepends the keys and values of each row's prompt."""

    def __init__(
        self,
        prompts: _PromptRecorder,
        owner: Int[mx.array, " batch"],
        length: Int[mx.array, " batch"],
        padded: bool,
    ) -> None:
        assert prompts.state is not None
        keys, values = prompts.state
        self.offset = length
        self._padded = padded
        self.state = keys[owner], values[owner]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        prompt_keys, prompt_values = self.state
        joined = mx.concatenate([prompt_keys, keys], axis=2)
        return joined, mx.concatenate([prompt_values, values], axis=2)

    def make_mask(
        self, time: int, *, return_array: bool = False, **_: Any
    ) -> Bool[mx.array, "batch 1 time all"] | str:
        """Return "causal" if possible: an array grows with the square of the length."""
        if not (self._padded or return_array):
            return "causal"
        width = self.state[0].shape[2]
        in_prompt = mx.arange(width)[None, :] < self.offset[:, None]
        shape = (len(self.offset), time)
        prompt = mx.broadcast_to(in_prompt[:, None, :], (*shape, width))
        own = mx.broadcast_to(mx.tril(mx.ones((time, time), dtype=mx.bool_)), (*shape, time))
        return mx.concatenate([prompt, own], axis=2)[:, None]

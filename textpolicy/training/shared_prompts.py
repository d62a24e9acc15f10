"""Forward passes on batches: each group's prompt once, or each row with its prompt.

Keys and values of a shared prompt are prepended to those of each completion, and recurrent layers
continue from their states after the prompt. Both are differentiable, so gradients equal those of
the forward pass on whole rows.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Bool, Float, Int
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import ArraysCache, make_prompt_cache

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
        # These numbers came from the host. To compute with them on the device, and to read the
        # result, would wait for the micro-batch before.
        padded = min(cast(list[int], batch.prompt_lengths.tolist())) < batch.prompts.shape[1]
        cache = [
            _recurrent_layer([array[batch.owner] for array in cast(list[mx.array], layer.cache)])
            if isinstance(layer, ArraysCache)
            else _PromptPrefix(layer, batch.owner, length, padded)
            for layer in _read_prompts(network, model, batch)
        ]
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


def _read_prompts(
    network: Callable[..., mx.array], model: nn.Module, batch: Batch
) -> Sequence["ArraysCache | _PromptRecorder"]:
    """Return what each layer has recorded of all prompts but their last tokens.

    Padding would change the states of recurrent layers, and not all layers of mlx-lm leave it out.
    Models with such layers read the prompts of one length together.
    """
    layers = make_prompt_cache(model)
    if not any(isinstance(layer, ArraysCache) for layer in layers):
        recorded = [_PromptRecorder() for _ in layers]
        network(batch.prompts[:, :-1], cache=recorded)
        return recorded
    prompts_by_width: dict[int, list[int]] = {}
    for prompt, length in enumerate(cast(list[int], batch.prompt_lengths.tolist())):
        prompts_by_width.setdefault(length - 1, []).append(prompt)
    # The longest come first: the others are padded to their shape, after they were read.
    parts = sorted(prompts_by_width.items(), reverse=True)
    read = [_read_equal_prompts(network, model, batch.prompts[mx.array(p), :w]) for w, p in parts]
    place = mx.argsort(mx.array([prompt for _, prompts in parts for prompt in prompts]))
    sizes = [len(prompts) for _, prompts in parts]
    return [_join_prompts(of_parts, sizes, place) for of_parts in zip(*read, strict=True)]


def _read_equal_prompts(
    network: Callable[..., mx.array], model: nn.Module, tokens: Int[mx.array, "prompts time"]
) -> list["ArraysCache | _PromptRecorder"]:
    layers = make_prompt_cache(model)
    recorded: list[ArraysCache | _PromptRecorder] = [
        one if isinstance(one, ArraysCache) else _PromptRecorder() for one in layers
    ]
    if tokens.shape[1]:
        network(tokens, cache=recorded)
    return recorded


def _join_prompts(
    parts: Sequence["ArraysCache | _PromptRecorder"], sizes: list[int], place: mx.array
) -> "ArraysCache | _PromptRecorder":
    """Return one layer's record of all prompts in their order; `sizes` are the parts' prompts."""
    recurrent = isinstance(parts[0], ArraysCache)
    arrays: list[Any] = [
        part.cache if isinstance(part, ArraysCache) else part.state or [None, None]
        for part in parts
    ]

    def join(number: int) -> mx.array:
        longest: mx.array = arrays[0][number]
        padded: list[mx.array] = []
        for size, own in zip(sizes, arrays, strict=True):
            array = own[number]
            if array is None:
                # Nothing was read of prompts of one token.
                array = mx.zeros((size, *longest.shape[1:]), dtype=longest.dtype)
            missing = 0 if recurrent else longest.shape[2] - array.shape[2]
            widths = [(0, 0), (0, 0), (0, missing), (0, 0)]
            padded.append(mx.pad(array, widths) if missing else array)
        return mx.concatenate(padded)[place]

    joined = [join(number) for number in range(len(arrays[0]))]
    if recurrent:
        return _recurrent_layer(joined)
    recorder = _PromptRecorder()
    recorder.state = joined[0], joined[1]
    return recorder


def _recurrent_layer(arrays: list[mx.array]) -> ArraysCache:
    layer = ArraysCache(len(arrays))
    layer.cache = arrays
    return layer


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

"""Reading prompts and replies into the KV cache of a batch; the prompt of a group runs once."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import PromptProcessingBatch
from mlx_lm.models.cache import BatchKVCache, make_prompt_cache

from textpolicy.device_sizes import device_sizes
from textpolicy.generation.decoding_batch import (
    DecodingBatch,
    DecodingCache,
    DecodingRow,
    merge_batches,
)
from textpolicy.generation.prefix_cache import PrefixCache


def prefill_prompts(
    model: nn.Module,
    groups: Sequence[Sequence[DecodingRow]],
    prefixes: PrefixCache | None = None,
) -> DecodingBatch:
    """Return a batch of all rows with their prompts in the KV cache, except the last token.

    The prompt of a group runs once, and its cache is copied for each row of the group. What
    `prefixes` has of a prompt does not run again.
    """
    prompts = [group[0].context[:-1] for group in groups]
    if {*map(len, prompts)} == {0, 1}:
        # A sliding-window cache takes a single position for a decoded token, of all rows or none.
        empty, single = (
            prefill_prompts(model, [group for group in groups if len(group[0].context) == length])
            for length in (1, 2)
        )
        return merge_batches(empty, single)
    known = [prefixes.longest(prompt) if prefixes else (0, []) for prompt in prompts]
    unread = [prompt[length:] for prompt, (length, _) in zip(prompts, known, strict=True)]
    prefill = PromptProcessingBatch(
        model,
        list(range(len(groups))),
        [cache or make_prompt_cache(model) for _, cache in known],
        prefill_step_size=_prefill_chunk(unread),
    )
    prefill.prompt(unread)
    rows = [row for group in groups for row in group]
    owner = mx.array([g for g, group in enumerate(groups) for _ in group])
    room = min(max(row.sampling.max_tokens for row in rows), BatchKVCache.step)
    return DecodingBatch(
        rows=rows,
        cache=[_repeat_prompts(layer, owner, room) for layer in prefill.prompt_cache],
        last_tokens=mx.array([row.context[-1] for row in rows]),
        keys=np.stack([row.key for row in rows]),
    )


def prefill_replies(model: nn.Module, turns: DecodingBatch) -> DecodingBatch:
    """Return the batch with each row's context in the KV cache, except the last token."""
    numbers = list(range(len(turns.rows)))
    uncached = [row.context[row.cached : -1] for row in turns.rows]
    size = _prefill_chunk(uncached)
    if all(isinstance(layer, BatchKVCache) for layer in turns.cache):
        prefill = PromptProcessingBatch(model, numbers, [], prefill_step_size=size)
        prefill.prompt_cache = turns.cache
    else:
        # A rotated sliding-window cache is put in order by splitting and merging its rows.
        caches = [[layer.extract(number) for layer in turns.cache] for number in numbers]
        prefill = PromptProcessingBatch(model, numbers, caches, prefill_step_size=size)
    prefill.prompt(uncached)
    last_tokens = mx.array([row.context[-1] for row in turns.rows])
    return DecodingBatch(turns.rows, prefill.prompt_cache, last_tokens, turns.keys)


def _prefill_chunk(texts: Sequence[Sequence[int]]) -> int:
    """Return how many positions of each text one forward pass processes."""
    longest = max(map(len, texts))
    size = max(2, device_sizes().prefill_tokens // len(texts))
    # No chunk may have a single position: a sliding-window cache takes it for a decoded token.
    while longest > size and longest % size == 1:
        size += 1
    return size


def _repeat_prompts(layer: Any, owner: mx.array, room: int) -> Any:
    if type(layer) is BatchKVCache:
        return DecodingCache.repeat_prompts(layer, owner, room)
    layer.filter(owner)
    return layer

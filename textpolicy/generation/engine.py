"""Continuous batched decoding: rows of all groups advance together, a group's prompt runs once.

mlx-lm's caches and ragged prefill do the work. Its `BatchGenerator` is not used on top of them,
because it hands out whole-vocabulary log-probabilities in the model's dtype, before temperature
and truncation, and draws all rows from one global random state. Training needs each drawn token's
own float32 log-probability, and a row must not depend on its neighbours.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import PromptProcessingBatch
from mlx_lm.models.cache import BatchKVCache, make_prompt_cache

from textpolicy.generation.decoding_cache import DecodingCache
from textpolicy.generation.decoding_rows import (
    DecodingBatch,
    DecodingRow,
    DrawnTokens,
    RespondToRow,
    StopRule,
    join,
)
from textpolicy.generation.sampling import draw, penalise_repetition, random_keys
from textpolicy.types import Sampling

MAX_DECODING_ROWS = 256
"""Rows that decode together, unless a policy is told otherwise."""
PREFILL_CHUNK_TOKENS = 2048
"""Prompt positions of all rows that are read in one forward pass."""
_NEXT_KEY = np.array([0, 1], dtype=np.uint32)


def decode(
    model: nn.Module,
    prompts: Sequence[list[int]],
    *,
    n: int,
    sampling: Sampling,
    stop: StopRule,
    seed: int,
    max_rows: int,
    together: bool = True,
    ahead: bool = False,
    respond: RespondToRow | None = None,
) -> list[list[DecodingRow]]:
    """`n` finished rows for each prompt. Groups are admitted while `max_rows` allow it, and alone
    if they are larger; freed slots refill. Without `together`, each row is decoded by itself.

    A row whose turn ended goes on from its own cache as soon as `respond` has tokens for it. What
    is returned are the rows' last turns. With `ahead`, the device is set to the next step before
    the tokens of this one are looked at, where neither a next turn nor a penalty waits for them.
    """
    ahead = ahead and respond is None and sampling.repetition_penalty == 1.0
    groups = [[DecodingRow(p, m, prompt) for m in range(n)] for p, prompt in enumerate(prompts)]
    waiting = deque(groups if together else [[row] for group in groups for row in group])
    size, limit = (n, max_rows) if together else (1, 1)
    active: DecodingBatch | None = None
    heard: DecodingBatch | None = None
    while waiting or heard or active:
        decoding, listening = (rows.going if rows else 0 for rows in (active, heard))
        room = limit - (len(active.rows) if active else 0) - listening
        admitted = [waiting.popleft() for _ in range(min(len(waiting), room // size))]
        if not (admitted or active or heard):
            admitted = [waiting.popleft()]
        if admitted:
            active = _admit(model, active, admitted, sampling, seed)
        # Reading what was heard is one ragged pass, so it waits until enough rows share it.
        if heard and listening >= decoding:
            active, heard = join(active, read(model, heard)), None
        assert active is not None
        ended = _advance(model, active, sampling, stop, ahead=ahead)
        if respond and (going_on := listen(active, ended, respond)):
            heard = join(heard, going_on)
            for row in going_on.rows:
                groups[row.prompt][row.member] = row
        # Dropping rows copies the whole cache, so it waits until half of them are done.
        if 2 * active.going <= len(active.rows):
            active = active.without_finished()
    return groups


def _admit(
    model: nn.Module,
    active: DecodingBatch | None,
    groups: list[list[DecodingRow]],
    sampling: Sampling,
    seed: int,
) -> DecodingBatch:
    """What is being decoded and these groups. No name outlives it that would keep old caches."""
    fresh = prefill(model, groups, seed, room=sampling.max_tokens)
    if active is None:
        return fresh
    if active.drawn:
        fresh.drawn = _draw(model, fresh, sampling)
    return active.join(fresh)


def listen(
    active: DecodingBatch, ended: Sequence[int], respond: RespondToRow
) -> DecodingBatch | None:
    """The rows among those that ended which have a next turn, with what they hear unread."""
    heard = {index: respond(active.rows[index]) for index in ended}
    replies = {index: tokens for index, tokens in heard.items() if tokens is not None}
    if not replies:
        return None
    picked = active.pick(list(replies))
    picked.rows = [row.after(replies[i]) for i, row in zip(replies, picked.rows, strict=True)]
    return picked


def read(model: nn.Module, heard: DecodingBatch) -> DecodingBatch:
    """Run what each row's cache has not read, all but the last token."""
    numbers = list(range(len(heard.rows)))
    unread = [row.context[row.read : -1] for row in heard.rows]
    size = _chunk(unread)
    if all(isinstance(layer, BatchKVCache) for layer in heard.cache):
        batch = PromptProcessingBatch(model, numbers, [], prefill_step_size=size)
        batch.prompt_cache = heard.cache
    else:
        # A window that has gone round is put in order by taking its rows apart and together.
        caches = [[layer.extract(number) for layer in heard.cache] for number in numbers]
        batch = PromptProcessingBatch(model, numbers, caches, prefill_step_size=size)
    batch.prompt(unread)
    last = mx.array([row.context[-1] for row in heard.rows])
    return DecodingBatch(heard.rows, batch.prompt_cache, last, heard.keys)


def prefill(
    model: nn.Module, groups: list[list[DecodingRow]], seed: int, *, room: int
) -> DecodingBatch:
    """Run each group's prompt once, all but its last token, and fan the caches out to the rows."""
    prompts = [group[0].context[:-1] for group in groups]
    if {*map(len, prompts)} == {0, 1}:
        # A windowed cache takes a single position for one that was drawn, of all rows or none.
        parts = ([g for g in groups if len(g[0].context) == length] for length in (1, 2))
        alone, read = (prefill(model, part, seed, room=room) for part in parts)
        return alone.join(read)
    batch = PromptProcessingBatch(
        model,
        list(range(len(groups))),
        [make_prompt_cache(model) for _ in groups],
        prefill_step_size=_chunk(prompts),
    )
    batch.prompt(prompts)
    rows = [row for group in groups for row in group]
    owner = mx.array([g for g, group in enumerate(groups) for _ in group])
    return DecodingBatch(
        rows=rows,
        cache=[
            _fan_out(layer, owner, min(room, BatchKVCache.step)) for layer in batch.prompt_cache
        ],
        last=mx.array([row.context[-1] for row in rows]),
        keys=random_keys(seed, [(row.prompt, row.member) for row in rows]),
    )


def _chunk(texts: Sequence[Sequence[int]]) -> int:
    """How many positions of each text to read at once."""
    longest = max(map(len, texts))
    size = max(2, PREFILL_CHUNK_TOKENS // len(texts))
    # Of rows of unequal length, a windowed cache takes a single position for one that was drawn.
    while longest > size and longest % size == 1:
        size += 1
    return size


def _fan_out(layer: Any, owner: mx.array, room: int) -> Any:
    if type(layer) is BatchKVCache and not layer.empty():
        return DecodingCache.repeat_prompts(layer, owner, room)
    layer.filter(owner)
    return layer


def _advance(
    model: nn.Module, active: DecodingBatch, sampling: Sampling, stop: StopRule, *, ahead: bool
) -> list[int]:
    """Give every row that goes on one more token; returns the indices of those that now end."""
    tokens, logprobs = active.drawn or _draw(model, active, sampling)
    longest = sampling.max_tokens - 1
    ahead = ahead and any(r.stop_reason is None and len(r.tokens) < longest for r in active.rows)
    active.drawn = _draw(model, active, sampling) if ahead else None
    # Through numpy: one transfer for all rows.
    drawn = zip(active.rows, np.array(tokens), np.array(logprobs), strict=True)
    return [
        index
        for index, (row, token, logprob) in enumerate(drawn)
        if row.stop_reason is None
        and row.take(int(token), float(logprob), stop, sampling.max_tokens)
    ]


def _draw(model: nn.Module, active: DecodingBatch, sampling: Sampling) -> DrawnTokens:
    """Set the device to one more step of every row."""
    logits = model(active.last[:, None], cache=active.cache)[:, -1, :].astype(mx.float32)
    if sampling.repetition_penalty != 1.0:
        contexts = [row.context + row.tokens for row in active.rows]
        logits = penalise_repetition(logits, contexts, sampling.repetition_penalty)
    drawn = draw(logits, mx.array(active.keys), sampling)
    mx.async_eval(drawn, [layer.state for layer in active.cache])
    active.last = drawn[0]
    active.keys = active.keys + _NEXT_KEY
    return drawn

"""Continuous batched decoding: rows of many prompts advance together; a shared prompt runs once.

mlx-lm provides the caches and the ragged prefill. mlx-lm's `BatchGenerator` is not used, because it
returns log-probabilities of the whole vocabulary in the model's dtype, before temperature and
truncation, and because it draws all rows from one global random state. Training needs the float32
log-probability of each sampled token, and a row must not depend on the rows beside it.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from jaxtyping import Float
from mlx_lm.generate import PromptProcessingBatch
from mlx_lm.models.cache import BatchKVCache, make_prompt_cache

from textpolicy.generation.decoding_batch import (
    DecodingBatch,
    DecodingCache,
    DecodingRow,
    RespondToRow,
    StopRule,
    merge_batches,
)
from textpolicy.generation.sampling import draw_tokens, penalise_repetition, random_keys
from textpolicy.types import Sampling

MAX_DECODING_ROWS = 256
"""The number of rows that decode together, unless a policy is given another number."""
PREFILL_CHUNK_TOKENS = 2048
"""The number of prompt positions, over all rows, that one forward pass processes."""
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
    batched: bool = True,
    launch_ahead: bool = False,
    respond: RespondToRow | None = None,
    on_ended: Callable[[int], None] = lambda number: None,
) -> list[list[DecodingRow]]:
    """Return `n` finished rows for each prompt.

    A group starts as soon as its `n` rows fit into `max_rows` beside the rows that still decode; a
    group larger than `max_rows` decodes alone. If not `batched`, each row decodes alone.

    With `respond`, a row that ended continues with its next turn from its own KV cache, and the
    last turn of each row is returned. With `launch_ahead`, the device starts the next step before
    Python reads the tokens of this step, unless a reply or a penalty needs these tokens first.
    `on_ended` is called after each step with the number of rows that have ended in it.
    """
    launch_ahead = launch_ahead and respond is None and sampling.repetition_penalty == 1.0
    groups = [[DecodingRow(p, m, prompt) for m in range(n)] for p, prompt in enumerate(prompts)]
    waiting = deque(groups if batched else [[row] for group in groups for row in group])
    size, limit = (n, max_rows) if batched else (1, 1)
    batch: DecodingBatch | None = None
    replied: DecodingBatch | None = None
    while waiting or replied or batch:
        decoding, unread = (rows.unfinished if rows else 0 for rows in (batch, replied))
        room = limit - (len(batch.rows) if batch else 0) - unread
        admitted = [waiting.popleft() for _ in range(min(len(waiting), room // size))]
        if not (admitted or batch or replied):
            admitted = [waiting.popleft()]
        if admitted:
            batch = _admit_groups(model, batch, admitted, sampling, seed)
        # The prefill of replies is one ragged pass, so it waits until enough rows share the pass.
        if replied and unread >= decoding:
            batch, replied = merge_batches(batch, prefill_replies(model, replied)), None
        assert batch is not None
        ended = _decode_step(model, batch, sampling, stop, launch_ahead=launch_ahead)
        next_turns = begin_next_turns(batch, ended, respond) if respond else None
        if next_turns:
            replied = merge_batches(replied, next_turns)
            for row in next_turns.rows:
                groups[row.prompt][row.member] = row
        on_ended(len(ended) - (len(next_turns.rows) if next_turns else 0))
        # Dropping rows copies the whole cache, so it waits until half of the rows have ended.
        if 2 * batch.unfinished <= len(batch.rows):
            batch = batch.drop_finished()
    return groups


def can_decode_together(model: nn.Module) -> bool:
    """Return whether rows of unequal length decode together as each row does alone.

    With mlx-lm 0.32 some architectures cannot: gemma2 applies the batch's mask to its heads, and
    recurrent states take in the padding. The check is a prompt and a reply of two rows.
    """
    prompts, replies = [[1, 2, 3, 4], [2]], [[3], [1, 4, 2]]
    try:
        together = _two_turn_logits(model, prompts, replies)
    except ValueError:
        return False
    pairs = zip(prompts, replies, strict=True)
    each = [_two_turn_logits(model, [prompt], [reply]) for prompt, reply in pairs]
    alone = mx.concatenate(each, axis=1)
    tolerance = 1e-3 if alone.dtype == mx.float32 else 0.1
    return float(mx.abs(together - alone).astype(mx.float32).mean()) < tolerance


def _two_turn_logits(
    model: nn.Module, prompts: list[list[int]], replies: list[list[int]]
) -> Float[mx.array, "turns rows vocab"]:
    """Return the logits after each prompt, and after a reply to the answer of one token 0."""
    rows = [DecodingRow(p, 0, prompt, tokens=[0]) for p, prompt in enumerate(prompts)]
    batch = prefill_prompts(model, [[row] for row in rows], seed=0, room=1)
    first = _next_logits(model, batch)
    next_turns = begin_next_turns(batch, range(len(rows)), lambda row: replies[row.prompt])
    assert next_turns is not None
    return mx.stack([first, _next_logits(model, prefill_replies(model, next_turns))])


def _next_logits(model: nn.Module, batch: DecodingBatch) -> Float[mx.array, "rows vocab"]:
    return model(batch.last_tokens[:, None], cache=batch.cache)[:, -1, :]


def _admit_groups(
    model: nn.Module,
    batch: DecodingBatch | None,
    groups: list[list[DecodingRow]],
    sampling: Sampling,
    seed: int,
) -> DecodingBatch:
    """Return the batch with the rows of these groups.

    This is a function of its own so that none of its names keeps an old cache alive.
    """
    fresh = prefill_prompts(model, groups, seed, room=sampling.max_tokens)
    if batch and batch.pending:
        fresh.pending = _launch_step(model, fresh, sampling)
    return merge_batches(batch, fresh)


def begin_next_turns(
    batch: DecodingBatch, ended: Sequence[int], respond: RespondToRow
) -> DecodingBatch | None:
    """Return the next turns of the rows that ended, or None if no row has a next turn.

    The KV cache of the result does not hold the replies yet.
    """
    answers = {index: respond(batch.rows[index]) for index in ended}
    replies = {index: reply for index, reply in answers.items() if reply is not None}
    if not replies:
        return None
    turns = batch.copy_rows(list(replies))
    turns.rows = [row.next_turn(replies[i]) for i, row in zip(replies, turns.rows, strict=True)]
    return turns


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


def prefill_prompts(
    model: nn.Module, groups: list[list[DecodingRow]], seed: int, *, room: int
) -> DecodingBatch:
    """Return a batch of all rows with their prompts in the KV cache, except the last token.

    The prompt of a group runs once, and its cache is copied for each row of the group.
    """
    prompts = [group[0].context[:-1] for group in groups]
    if {*map(len, prompts)} == {0, 1}:
        # A sliding-window cache takes a single position for a decoded token, of all rows or none.
        empty, single = (
            prefill_prompts(
                model, [g for g in groups if len(g[0].context) == length], seed, room=room
            )
            for length in (1, 2)
        )
        return merge_batches(empty, single)
    prefill = PromptProcessingBatch(
        model,
        list(range(len(groups))),
        [make_prompt_cache(model) for _ in groups],
        prefill_step_size=_prefill_chunk(prompts),
    )
    prefill.prompt(prompts)
    rows = [row for group in groups for row in group]
    owner = mx.array([g for g, group in enumerate(groups) for _ in group])
    room = min(room, BatchKVCache.step)
    return DecodingBatch(
        rows=rows,
        cache=[_repeat_prompts(layer, owner, room) for layer in prefill.prompt_cache],
        last_tokens=mx.array([row.context[-1] for row in rows]),
        keys=random_keys(seed, [(row.prompt, row.member) for row in rows]),
    )


def _prefill_chunk(texts: Sequence[Sequence[int]]) -> int:
    """Return how many positions of each text one forward pass processes."""
    longest = max(map(len, texts))
    size = max(2, PREFILL_CHUNK_TOKENS // len(texts))
    # No chunk may have a single position: a sliding-window cache takes it for a decoded token.
    while longest > size and longest % size == 1:
        size += 1
    return size


def _repeat_prompts(layer: Any, owner: mx.array, room: int) -> Any:
    if type(layer) is BatchKVCache and not layer.empty():
        return DecodingCache.repeat_prompts(layer, owner, room)
    layer.filter(owner)
    return layer


def _decode_step(
    model: nn.Module,
    batch: DecodingBatch,
    sampling: Sampling,
    stop: StopRule,
    *,
    launch_ahead: bool,
) -> list[int]:
    """Append one token to every unfinished row; return the indices of the rows that end now."""
    tokens, logprobs = batch.pending or _launch_step(model, batch, sampling)
    before_last = sampling.max_tokens - 1
    unfinished = [row for row in batch.rows if row.stop_reason is None]
    another = launch_ahead and any(len(row.tokens) < before_last for row in unfinished)
    batch.pending = _launch_step(model, batch, sampling) if another else ()
    # One transfer to numpy for all rows.
    drawn = zip(batch.rows, np.array(tokens), np.array(logprobs), strict=True)
    return [
        index
        for index, (row, token, logprob) in enumerate(drawn)
        if row.stop_reason is None
        and row.append(int(token), float(logprob), stop, sampling.max_tokens)
    ]


def _launch_step(
    model: nn.Module, batch: DecodingBatch, sampling: Sampling
) -> tuple[mx.array, mx.array]:
    """Start one decode step on the device; return its tokens and their log-probabilities."""
    logits = _next_logits(model, batch).astype(mx.float32)
    if sampling.repetition_penalty != 1.0:
        contexts = [row.context + row.tokens for row in batch.rows]
        logits = penalise_repetition(logits, contexts, sampling.repetition_penalty)
    drawn = draw_tokens(logits, mx.array(batch.keys), sampling)
    mx.async_eval(drawn, [layer.state for layer in batch.cache])
    batch.last_tokens = drawn[0]
    batch.keys = batch.keys + _NEXT_KEY
    return drawn

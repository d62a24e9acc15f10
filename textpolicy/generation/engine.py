"""Continuous batched decoding: rows of all groups advance together, a group's prompt runs once.

mlx-lm's caches and ragged prefill do the work. Its `BatchGenerator` is not used on top of them,
because it hands out whole-vocabulary log-probabilities in the model's dtype, before temperature
and truncation, and draws all rows from one global random state. Training needs each drawn token's
own float32 log-probability, and a row must not depend on its neighbours.
"""

from collections import deque
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from jaxtyping import Float
from mlx_lm.generate import PromptProcessingBatch
from mlx_lm.models.cache import BatchKVCache, make_prompt_cache

from textpolicy.generation.sampling import draw, penalise_repetition, row_keys
from textpolicy.types import Sampling, StopReason

StopRule = Callable[[list[int]], StopReason | None]
"""Given a row's drawn tokens: why it ends here, or None to go on."""


@dataclass(slots=True)
class Row:
    """One completion in the making. Its cache holds the first `read` tokens of its context."""

    prompt: int
    member: int
    context: list[int]
    tokens: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])
    stop_reason: StopReason | None = None
    read: int = 0
    drawn_before: int = 0

    def after(self, heard: list[int]) -> "Row":
        """The next turn of this row: all it has read and said, and what it heard since."""
        said = self.context + self.tokens
        return Row(
            self.prompt,
            self.member,
            said + heard,
            # The last token drawn has not been through the model.
            read=len(said) - 1,
            drawn_before=self.drawn_before + len(self.tokens),
        )


Respond = Callable[[Row], list[int] | None]
"""Given a row that ended: the tokens that it hears before its next turn, or None if it is over."""


@dataclass(slots=True)
class _Active:
    """The rows being decoded, and their device state in the same order."""

    rows: list[Row]
    cache: list[Any]
    last: mx.array
    keys: np.ndarray

    def join(self, other: "_Active") -> "_Active":
        for mine, theirs in zip(self.cache, other.cache, strict=True):
            mine.extend(theirs)
        return _Active(
            rows=self.rows + other.rows,
            cache=self.cache,
            last=mx.concatenate([self.last, other.last]),
            keys=np.concatenate([self.keys, other.keys]),
        )

    def pick(self, indices: list[int]) -> "_Active":
        """A copy of these rows; this stays as it is."""
        index = mx.array(indices)
        cache = deepcopy(self.cache)
        for layer in cache:
            layer.filter(index)
        rows = [self.rows[i] for i in indices]
        return _Active(rows, cache, self.last[index], self.keys[indices])

    def without_finished(self) -> "_Active | None":
        keep = [i for i, row in enumerate(self.rows) if row.stop_reason is None]
        if not keep:
            return None
        index = mx.array(keep)
        for layer in self.cache:
            layer.filter(index)
        return _Active([self.rows[i] for i in keep], self.cache, self.last[index], self.keys[keep])


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
    respond: Respond = lambda row: None,
) -> list[list[Row]]:
    """`n` finished rows for each prompt. Groups are admitted while `max_rows` allow it, and alone
    if they are larger; freed slots refill. Without `together`, each row is decoded by itself.

    A row whose turn ended goes on from its own cache as soon as `respond` has tokens for it. What
    is returned are the rows' last turns.
    """
    groups = [[Row(p, m, prompt) for m in range(n)] for p, prompt in enumerate(prompts)]
    waiting = deque(groups if together else [[row] for group in groups for row in group])
    size, limit = (n, max_rows) if together else (1, 1)
    active: _Active | None = None
    heard: _Active | None = None
    while waiting or heard or active:
        decoding, listening = _count_going(active), _count_going(heard)
        room = limit - (len(active.rows) if active else 0) - listening
        admitted = [waiting.popleft() for _ in range(min(len(waiting), room // size))]
        if not (admitted or active or heard):
            admitted = [waiting.popleft()]
        if admitted:
            active = _join(active, _prefill(model, admitted, seed))
        # Reading what was heard is one ragged pass, so it waits until enough rows share it.
        if heard and listening >= decoding:
            active, heard = _join(active, _read(model, heard)), None
        assert active is not None
        ended = _advance(model, active, sampling, stop)
        if going_on := _listen(active, ended, respond):
            heard = _join(heard, going_on)
            for row in going_on.rows:
                groups[row.prompt][row.member] = row
        # Dropping rows copies the whole cache, so it waits until half of them are done.
        if 2 * _count_going(active) <= len(active.rows):
            active = active.without_finished()
    return groups


def _listen(active: _Active, ended: Sequence[int], respond: Respond) -> _Active | None:
    """The rows among those that ended which have a next turn, with what they hear unread."""
    heard = {index: respond(active.rows[index]) for index in ended}
    replies = {index: tokens for index, tokens in heard.items() if tokens is not None}
    if not replies:
        return None
    picked = active.pick(list(replies))
    picked.rows = [row.after(replies[i]) for i, row in zip(replies, picked.rows, strict=True)]
    return picked


def _read(model: nn.Module, heard: _Active) -> _Active:
    """Run what each row's cache has not read, all but the last token."""
    numbers = list(range(len(heard.rows)))
    if all(type(layer) is BatchKVCache for layer in heard.cache):
        batch = PromptProcessingBatch(model, numbers, [])
        batch.prompt_cache = heard.cache
    else:
        # A window that has gone round is put in order by taking its rows apart and together.
        caches = [[layer.extract(number) for layer in heard.cache] for number in numbers]
        batch = PromptProcessingBatch(model, numbers, caches)
    batch.prompt([row.context[row.read : -1] for row in heard.rows])
    last = mx.array([row.context[-1] for row in heard.rows])
    return _Active(heard.rows, batch.prompt_cache, last, heard.keys)


def _join(active: _Active | None, fresh: _Active | None) -> _Active | None:
    return active.join(fresh) if active and fresh else active or fresh


def _count_going(active: _Active | None) -> int:
    return sum(row.stop_reason is None for row in active.rows) if active else 0


def can_batch(model: nn.Module) -> bool:
    """Whether rows of unequal length decode together to what each gives alone, two turns long.

    Not so for every architecture in mlx-lm 0.32: gemma2 lays a batch's mask over its heads, and
    recurrent states take in the padding.
    """
    prompts, replies = [[1, 2, 3, 4], [2]], [[3], [1, 4, 2]]
    try:
        together = _probe(model, prompts, replies)
    except ValueError:
        return False
    pairs = zip(prompts, replies, strict=True)
    alone = mx.concatenate([_probe(model, [prompt], [reply]) for prompt, reply in pairs], axis=1)
    tolerance = 1e-3 if alone.dtype == mx.float32 else 0.1
    return float(mx.abs(together - alone).astype(mx.float32).mean()) < tolerance


def _probe(
    model: nn.Module, prompts: list[list[int]], replies: list[list[int]]
) -> Float[mx.array, "turns rows vocab"]:
    """The logits after each prompt, and after a reply to the token 0 drawn then."""
    rows = [Row(p, 0, prompt, tokens=[0]) for p, prompt in enumerate(prompts)]
    active = _prefill(model, [[row] for row in rows], seed=0)
    first = model(active.last[:, None], cache=active.cache)[:, -1, :]
    heard = _listen(active, range(len(rows)), lambda row: replies[row.prompt])
    assert heard is not None
    heard = _read(model, heard)
    second = model(heard.last[:, None], cache=heard.cache)[:, -1, :]
    return mx.stack([first, second])


def _prefill(model: nn.Module, groups: list[list[Row]], seed: int) -> _Active:
    """Run each group's prompt once, all but its last token, and fan the caches out to the rows."""
    prompts = [group[0].context for group in groups]
    batch = PromptProcessingBatch(
        model, list(range(len(groups))), [make_prompt_cache(model) for _ in groups]
    )
    batch.prompt([prompt[:-1] for prompt in prompts])
    rows = [row for group in groups for row in group]
    owner = [g for g, group in enumerate(groups) for _ in group]
    for layer in batch.prompt_cache:
        layer.filter(mx.array(owner))
    return _Active(
        rows=rows,
        cache=batch.prompt_cache,
        last=mx.array([row.context[-1] for row in rows]),
        keys=row_keys(seed, [(row.prompt, row.member) for row in rows]),
    )


def _advance(model: nn.Module, active: _Active, sampling: Sampling, stop: StopRule) -> list[int]:
    """Draw one more token for every row that goes on; returns the indices of those that now end."""
    logits = model(active.last[:, None], cache=active.cache)[:, -1, :].astype(mx.float32)
    if sampling.repetition_penalty != 1.0:
        contexts = [row.context + row.tokens for row in active.rows]
        logits = penalise_repetition(logits, contexts, sampling.repetition_penalty)
    drawn = [row.drawn_before + len(row.tokens) for row in active.rows]
    keys = np.stack(
        [active.keys[:, 0], active.keys[:, 1] + np.array(drawn, dtype=np.uint32)], axis=1
    )
    tokens, logprobs = draw(logits, mx.array(keys), sampling)
    mx.eval(tokens, logprobs, [layer.state for layer in active.cache])
    active.last = tokens
    ended: list[int] = []
    # Through numpy: one transfer for all rows.
    drawn_rows = zip(active.rows, np.array(tokens), np.array(logprobs), strict=True)
    for index, (row, token, logprob) in enumerate(drawn_rows):
        if row.stop_reason is None:
            row.tokens.append(int(token))
            row.logprobs.append(float(logprob))
            row.stop_reason = _ends(row, sampling, stop)
            if row.stop_reason is not None:
                ended.append(index)
    return ended


def _ends(row: Row, sampling: Sampling, stop: StopRule) -> StopReason | None:
    full = len(row.tokens) >= sampling.max_tokens
    return stop(row.tokens) or (StopReason.LENGTH if full else None)

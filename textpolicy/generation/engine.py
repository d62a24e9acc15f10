"""Continuous batched decoding: rows of all groups advance together, a group's prompt runs once.

mlx-lm's caches and ragged prefill do the work. Its `BatchGenerator` is not used on top of them,
because it hands out whole-vocabulary log-probabilities in the model's dtype, before temperature
and truncation, and draws all rows from one global random state. Training needs each drawn token's
own float32 log-probability, and a row must not depend on its neighbours.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import PromptProcessingBatch
from mlx_lm.models.cache import make_prompt_cache

from textpolicy.generation.sampling import draw, penalise_repetition, row_keys
from textpolicy.types import Sampling, StopReason

StopRule = Callable[[list[int]], StopReason | None]
"""Given a row's drawn tokens: why it ends here, or None to go on."""


@dataclass(slots=True)
class Row:
    """One completion in the making."""

    prompt: int
    member: int
    context: list[int]
    tokens: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])
    stop_reason: StopReason | None = None


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
) -> list[list[Row]]:
    """`n` finished rows for each prompt. Groups are admitted while `max_rows` allow it, and alone
    if they are larger; freed slots refill. Without `together`, each row is decoded by itself.
    """
    groups = [[Row(p, m, prompt) for m in range(n)] for p, prompt in enumerate(prompts)]
    rows = [[row] for group in groups for row in group]
    waiting = deque(groups if together else rows)
    size, limit = (n, max_rows) if together else (1, 1)
    active: _Active | None = None
    while waiting or active:
        room = limit - (len(active.rows) if active else 0)
        admitted = [waiting.popleft() for _ in range(min(len(waiting), room // size))]
        if not admitted and active is None:
            admitted = [waiting.popleft()]
        if admitted:
            fresh = _prefill(model, admitted, seed)
            active = active.join(fresh) if active else fresh
        assert active is not None
        _advance(model, active, sampling, stop)
        finished = sum(row.stop_reason is not None for row in active.rows)
        # Dropping rows copies the whole cache, so it waits until half of them are done.
        if 2 * finished >= len(active.rows):
            active = active.without_finished()
    return groups


def can_batch(model: nn.Module) -> bool:
    """Whether rows of unequal length decode together to what each gives alone.

    Not so for every architecture in mlx-lm 0.32: gemma2 lays a batch's mask over its heads, and
    recurrent states take in the padding.
    """
    prompts = [[1, 2, 3, 4], [2]]
    try:
        together = _first_logits(model, prompts)
    except ValueError:
        return False
    alone = mx.concatenate([_first_logits(model, [prompt]) for prompt in prompts])
    tolerance = 1e-3 if alone.dtype == mx.float32 else 0.1
    return float(mx.abs(together - alone).astype(mx.float32).mean()) < tolerance


def _first_logits(model: nn.Module, prompts: list[list[int]]) -> mx.array:
    active = _prefill(model, [[Row(p, 0, prompt)] for p, prompt in enumerate(prompts)], seed=0)
    return model(active.last[:, None], cache=active.cache)[:, -1, :]


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


def _advance(model: nn.Module, active: _Active, sampling: Sampling, stop: StopRule) -> None:
    """Draw one more token for every row; rows that already ended keep theirs."""
    logits = model(active.last[:, None], cache=active.cache)[:, -1, :].astype(mx.float32)
    if sampling.repetition_penalty != 1.0:
        contexts = [row.context + row.tokens for row in active.rows]
        logits = penalise_repetition(logits, contexts, sampling.repetition_penalty)
    drawn = np.array([len(row.tokens) for row in active.rows], dtype=np.uint32)
    keys = np.stack([active.keys[:, 0], active.keys[:, 1] + drawn], axis=1)
    tokens, logprobs = draw(logits, mx.array(keys), sampling)
    mx.eval(tokens, logprobs, [layer.state for layer in active.cache])
    active.last = tokens
    # Through numpy: one transfer for all rows.
    for row, token, logprob in zip(active.rows, np.array(tokens), np.array(logprobs), strict=True):
        if row.stop_reason is None:
            row.tokens.append(int(token))
            row.logprobs.append(float(logprob))
            row.stop_reason = _ends(row, sampling, stop)


def _ends(row: Row, sampling: Sampling, stop: StopRule) -> StopReason | None:
    full = len(row.tokens) >= sampling.max_tokens
    return stop(row.tokens) or (StopReason.LENGTH if full else None)

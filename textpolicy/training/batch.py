"""Rollout groups to padded arrays."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from textpolicy.errors import TrainingError
from textpolicy.types import AdvantageFn, Batch, Rollout, RolloutGroup


@dataclass(frozen=True, slots=True)
class ScoredRow:
    """One rollout that counts, what it is worth, and the group whose prompt it shares."""

    rollout: Rollout
    advantage: float
    group: int

    @property
    def prompt(self) -> tuple[int, ...]:
        """The tokens before the first sampled one."""
        return tuple(self.rollout.tokens[: self.rollout.mask.index(True)])


def score_rows(groups: Sequence[RolloutGroup], advantage_fn: AdvantageFn) -> list[ScoredRow]:
    """The rollouts that have a reward, each with the advantage it has inside its group."""
    width = max((len(group.rollouts) for group in groups), default=0)
    rewards = np.full((len(groups), width), np.nan, dtype=np.float32)
    for g, group in enumerate(groups):
        for m, rollout in enumerate(group.rollouts):
            if rollout.reward is not None:
                rewards[g, m] = rollout.reward
    advantages = np.array(advantage_fn(mx.array(rewards)))
    return [
        ScoredRow(rollout, float(advantages[g, m]), g)
        for g, group in enumerate(groups)
        for m, rollout in enumerate(group.rollouts)
        if rollout.reward is not None
    ]


def micro_batches(rows: Sequence[ScoredRow], size: int | None) -> list[Batch]:
    """The optimizer batch cut into pieces of at most `size` rows, groups of like length together.

    Every piece carries the totals of the whole, and is padded to its own longest row.
    """
    longest: dict[int, int] = {}
    for row in rows:
        longest[row.group] = max(longest.get(row.group, 0), len(row.rollout.tokens))
    ordered = sorted(rows, key=lambda row: (longest[row.group], row.group))
    token_count = sum(sum(row.rollout.mask) for row in ordered)
    size = size or len(ordered)
    return [
        _pad(ordered[start : start + size], len(ordered), token_count)
        for start in range(0, len(ordered), size)
    ]


def _pad(rows: Sequence[ScoredRow], total_rows: int, token_count: int) -> Batch:
    index = {prompt: p for p, prompt in enumerate(dict.fromkeys(row.prompt for row in rows))}
    starts = [len(row.prompt) for row in rows]
    rollouts = [row.rollout for row in rows]
    mask = _right_padded([r.mask[s:] for r, s in zip(rollouts, starts, strict=True)], np.bool_)
    advantages = np.array([[row.advantage] for row in rows], np.float32) * mask
    return Batch(
        prompts=mx.array(_right_padded(list(index), np.int32)),
        prompt_lengths=mx.array([len(prompt) for prompt in index]),
        owner=mx.array([index[row.prompt] for row in rows]),
        tokens=mx.array(
            _right_padded([r.tokens[s:] for r, s in zip(rollouts, starts, strict=True)], np.int32)
        ),
        mask=mx.array(mask),
        logp_old=mx.array(
            _right_padded(
                [r.logprobs[s:] for r, s in zip(rollouts, starts, strict=True)], np.float32
            )
        ),
        advantages=mx.array(advantages),
        temperature=mx.array([r.sampling.temperature for r in rollouts], dtype=mx.float32),
        rows=total_rows,
        token_count=token_count,
    )


def _right_padded(lists: Sequence[Sequence[float]], dtype: type) -> np.ndarray:
    padded = np.zeros((len(lists), max(len(row) for row in lists)), dtype)
    for r, row in enumerate(lists):
        padded[r, : len(row)] = row
    return padded


def check_scorable(groups: Sequence[RolloutGroup]) -> None:
    """Refuse rollouts whose distribution the trainer cannot repeat."""
    for group in groups:
        for rollout in group.rollouts:
            if not rollout.sampling.scorable:
                raise TrainingError(
                    f"a rollout of task {group.task.id!r} was sampled with {rollout.sampling}, a "
                    "distribution that the trainer does not score (greedy, truncated or penalised)."
                    " Sample for training with temperature > 0, top_p 1, top_k 0, min_p 0 and "
                    "repetition_penalty 1"
                )

"""Rollout groups to rows, rows to padded arrays."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from random import Random

import mlx.core as mx
import numpy as np

from textpolicy.errors import TrainingError
from textpolicy.types import Batch, Rollout, RolloutGroup

MICRO_BATCH_TOKENS = 1024
"""Tokens of a micro-batch, unless its rows are given: more at once only takes more memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRow:
    """One rollout that counts, and what is known of it before an update.

    `start` is the place of its first sampled token. `logp_old` and `logp_ref` begin there; they
    are None until a trainer computes them, and `entropies` with them.
    """

    rollout: Rollout
    group: int
    member: int
    start: int
    advantage: float = 0.0
    silent: bool = False
    logp_old: np.ndarray | None = None
    logp_ref: np.ndarray | None = None
    entropies: np.ndarray | None = None

    @property
    def prompt(self) -> tuple[int, ...]:
        """The tokens before the first sampled one."""
        return tuple(self.rollout.tokens[: self.start])

    @property
    def sampled(self) -> np.ndarray:
        """Log-probabilities after the prompt, as recorded while sampling."""
        return np.array(self.rollout.logprobs[self.start :], np.float32)

    @property
    def old(self) -> np.ndarray:
        """What ratios are taken against: computed before the update, or else as recorded."""
        return self.sampled if self.logp_old is None else self.logp_old

    @property
    def teaches(self) -> bool:
        """Whether its advantage gives the loss something to learn."""
        return self.advantage != 0 and not self.silent

    @property
    def mask(self) -> list[bool]:
        """Which of the tokens after the prompt count for the loss; none of a silent row's."""
        mask = self.rollout.mask[self.start :]
        return [False] * len(mask) if self.silent else mask


@dataclass(frozen=True, slots=True)
class BatchTotals:
    """Totals over an optimizer batch, for losses that are cut into micro-batches."""

    rows: int
    token_count: int
    max_tokens: int
    entropies: np.ndarray | None

    @classmethod
    def of(cls, rows: Sequence[TrainingRow]) -> "BatchTotals":
        """The totals of these rows."""
        known = [r.entropies[np.array(r.mask)] for r in rows if r.entropies is not None]
        return cls(
            rows=len(rows),
            token_count=max(1, sum(sum(row.mask) for row in rows)),
            max_tokens=max(row.rollout.sampling.max_tokens for row in rows),
            entropies=np.concatenate(known) if known else None,
        )


def training_rows(groups: Sequence[RolloutGroup]) -> list[TrainingRow]:
    """The rollouts that have a reward, in order."""
    return [
        TrainingRow(rollout=rollout, group=g, member=m, start=rollout.mask.index(True))
        for g, group in enumerate(groups)
        for m, rollout in enumerate(group.rollouts)
        if rollout.reward is not None
    ]


def split_into_mini_batches(
    rows: Sequence[TrainingRow], count: int, shuffle: Random
) -> list[list[TrainingRow]]:
    """The rows dealt to `count` optimizer batches, whole groups to each, in a random order."""
    if count == 1:
        return [list(rows)]
    groups = sorted({row.group for row in rows})
    shuffle.shuffle(groups)
    dealt = [set(groups[start::count]) for start in range(count)]
    return [[row for row in rows if row.group in part] for part in dealt if part]


def split_into_micro_batches(
    rows: Sequence[TrainingRow], size: int | None, *, share_prompts: bool = True
) -> list[list[TrainingRow]]:
    """An optimizer batch in parts that are in memory one at a time, groups of like length together.

    Parts have at most `size` rows. Without a size they are whole groups, as many as have
    MICRO_BATCH_TOKENS with their padding; a group whose completions alone have more is cut, and
    without `share_prompts` one whose whole rows do.
    Groups in which no row has an advantage are in parts of their own, the last ones.
    """
    teaching = {row.group for row in rows if row.teaches}
    parts: list[list[TrainingRow]] = []
    for kind in (True, False):
        groups = _by_length([row for row in rows if (row.group in teaching) is kind])
        if size is None:
            parts += _packed(groups, share_prompts)
        else:
            parts += _cut([*chain.from_iterable(groups)], size)
    return parts


def _by_length(rows: Sequence[TrainingRow]) -> list[list[TrainingRow]]:
    groups: dict[int, list[TrainingRow]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    return sorted(groups.values(), key=lambda group: (_completion(group), _prompt(group)))


def _packed(groups: Sequence[list[TrainingRow]], share_prompts: bool) -> list[list[TrainingRow]]:
    parts: list[list[TrainingRow]] = []
    for group in groups:
        for piece in _pieces(group, share_prompts):
            together = [*parts[-1], *piece] if parts else piece
            tokens = count_padded_tokens(together, share_prompts=share_prompts)
            if parts and tokens <= MICRO_BATCH_TOKENS:
                parts[-1] = together
            else:
                parts.append(piece)
    return parts


def _pieces(group: list[TrainingRow], share_prompts: bool) -> list[list[TrainingRow]]:
    """A group whose completions are too many at once, like lengths together."""
    longest = _completion(group) + (0 if share_prompts else _prompt(group))
    if len(group) * longest <= MICRO_BATCH_TOKENS:
        return [group]
    # Never one row alone: losses that compare two find both.
    size = max(2, MICRO_BATCH_TOKENS // longest)
    return _cut(sorted(group, key=lambda row: len(row.mask)), size)


def _cut(rows: list[TrainingRow], size: int) -> list[list[TrainingRow]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def count_padded_tokens(rows: Sequence[TrainingRow], *, share_prompts: bool = True) -> int:
    """The places that these rows take in memory together, each prompt once if it is shared."""
    prompts = len({row.group for row in rows} if share_prompts else rows)
    return len(rows) * _completion(rows) + prompts * _prompt(rows)


def _completion(rows: Sequence[TrainingRow]) -> int:
    return max(len(row.rollout.tokens) - row.start for row in rows)


def _prompt(rows: Sequence[TrainingRow]) -> int:
    return max(row.start for row in rows)


def make_batch(rows: Sequence[TrainingRow], totals: BatchTotals) -> Batch:
    """Return the rows as padded arrays, with the totals of the optimizer batch."""
    index = {prompt: p for p, prompt in enumerate(dict.fromkeys(row.prompt for row in rows))}
    mask = _right_padded([row.mask for row in rows], np.bool_)
    ref = [row.logp_ref for row in rows if row.logp_ref is not None]
    return Batch(
        prompts=mx.array(_right_padded(list(index), np.int32)),
        prompt_lengths=mx.array([len(prompt) for prompt in index]),
        owner=mx.array([index[row.prompt] for row in rows]),
        group=mx.array([row.group for row in rows]),
        tokens=mx.array(_right_padded([r.rollout.tokens[r.start :] for r in rows], np.int32)),
        mask=mx.array(mask),
        logp_sampled=mx.array(_right_padded([row.sampled for row in rows], np.float32)),
        logp_old=mx.array(_right_padded([row.old for row in rows], np.float32)),
        logp_ref=mx.array(_right_padded(ref, np.float32)) if ref else None,
        advantages=mx.array(np.array([[row.advantage] for row in rows], np.float32) * mask),
        temperature=mx.array([row.rollout.sampling.temperature for row in rows], dtype=mx.float32),
        rows=totals.rows,
        token_count=totals.token_count,
        max_tokens=totals.max_tokens,
        entropies=None if totals.entropies is None else mx.array(totals.entropies),
    )


def _right_padded(lists: Sequence[Sequence[float] | np.ndarray], dtype: type) -> np.ndarray:
    padded = np.zeros((len(lists), max(len(row) for row in lists)), dtype)
    for r, row in enumerate(lists):
        padded[r, : len(row)] = row
    return padded


def check_usable_for_training(groups: Sequence[RolloutGroup]) -> None:
    """Refuse rollouts whose distribution the trainer cannot repeat."""
    for group in groups:
        for rollout in group.rollouts:
            if not rollout.sampling.usable_for_training:
                raise TrainingError(
                    f"a rollout of task {group.task.id!r} was sampled with {rollout.sampling}, a "
                    "distribution that the trainer does not score (greedy, truncated or penalised)."
                    " Sample for training with temperature > 0, top_p 1, top_k 0, min_p 0 and "
                    "repetition_penalty 1"
                )

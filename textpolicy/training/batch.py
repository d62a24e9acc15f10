"""Rollout groups become training rows, and training rows become padded arrays."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from random import Random

import mlx.core as mx
import numpy as np

from textpolicy.device_sizes import device_sizes
from textpolicy.errors import TrainingError
from textpolicy.types import Batch, Rollout, RolloutGroup, Segment, StopReason


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRow:
    """A segment of a rollout with a reward, and the numbers that are computed before its update.

    `logp_fresh`, `entropies` and `logp_ref` begin after the prompt. They are None if the trainer
    does not compute them. An `excluded` row is not part of the loss.
    """

    rollout: Rollout
    segment: Segment
    number: int
    """The place of the segment in the rollout."""
    group: int
    member: int
    prompt_length: int
    advantage: float = 0.0
    excluded: bool = False
    logp_fresh: np.ndarray | None = None
    entropies: np.ndarray | None = None
    logp_ref: np.ndarray | None = None

    @property
    def prompt(self) -> tuple[int, ...]:
        """The tokens before the first sampled token."""
        return tuple(self.segment.tokens[: self.prompt_length])

    @property
    def tokens(self) -> list[int]:
        """The tokens after the prompt."""
        return self.segment.tokens[self.prompt_length :]

    @property
    def mask(self) -> list[bool]:
        """True on the tokens after the prompt that are part of the loss."""
        mask = self.segment.mask[self.prompt_length :]
        return [False] * len(mask) if self.excluded else mask

    @property
    def logp_sampled(self) -> np.ndarray:
        """The log-probabilities after the prompt that were recorded while sampling."""
        return np.array(self.segment.logprobs[self.prompt_length :], np.float32)

    @property
    def logp_old(self) -> np.ndarray:
        """The log-probabilities in the denominator of ratios: fresh ones, else recorded ones."""
        return self.logp_sampled if self.logp_fresh is None else self.logp_fresh

    @property
    def sequence(self) -> tuple[int, int]:
        """The group and the member: what all segments of a rollout have in common."""
        return self.group, self.member

    @property
    def has_signal(self) -> bool:
        """Whether the advantage of this row contributes to the gradient."""
        return self.advantage != 0 and not self.excluded


@dataclass(frozen=True, slots=True)
class BatchTotals:
    """Totals over an optimizer batch. Losses of its micro-batches divide by them.

    `rows` counts rollouts, whatever the number of their segments is.
    """

    rows: int
    token_count: int
    max_tokens: int
    entropies: np.ndarray | None

    @classmethod
    def of(cls, rows: Sequence[TrainingRow]) -> "BatchTotals":
        """Return the totals of these rows."""
        known = [r.entropies[np.array(r.mask)] for r in rows if r.entropies is not None]
        return cls(
            rows=len({row.sequence for row in rows}),
            token_count=max(1, sum(sum(row.mask) for row in rows)),
            max_tokens=max(row.rollout.sampling.max_tokens for row in rows),
            entropies=np.concatenate(known) if known else None,
        )


def training_rows(
    groups: Sequence[RolloutGroup], *, exclude_truncated: bool = False
) -> list[TrainingRow]:
    """Return a row for each segment with sampled tokens of each rollout that has a reward."""
    return [
        TrainingRow(
            rollout=rollout,
            segment=segment,
            number=number,
            group=g,
            member=m,
            prompt_length=segment.mask.index(True),
            excluded=exclude_truncated and rollout.stop_reason is StopReason.LENGTH,
        )
        for g, group in enumerate(groups)
        for m, rollout in enumerate(group.rollouts)
        if rollout.reward is not None
        for number, segment in enumerate(rollout.segments)
        if any(segment.mask)
    ]


def rows_by_rollout(rows: Sequence[TrainingRow]) -> list[list[TrainingRow]]:
    """Return the rows of each rollout, in the order in which the rollouts first occur."""
    rollouts: dict[tuple[int, int], list[TrainingRow]] = {}
    for row in rows:
        rollouts.setdefault(row.sequence, []).append(row)
    return list(rollouts.values())


def check_usable_for_training(groups: Sequence[RolloutGroup]) -> None:
    """Raise `TrainingError` if the trainer cannot repeat the distribution of a rollout."""
    for group in groups:
        for rollout in group.rollouts:
            if not rollout.sampling.usable_for_training:
                raise TrainingError(
                    f"a rollout of task {group.task.id!r} was sampled with {rollout.sampling}. The "
                    "trainer cannot compute log-probabilities of greedy, truncated or penalised "
                    "sampling. Sample for training with temperature > 0, top_p 1, top_k 0, min_p 0 "
                    "and repetition_penalty 1"
                )


def split_into_mini_batches(
    rows: Sequence[TrainingRow], count: int, shuffle: Random
) -> list[list[TrainingRow]]:
    """Return `count` optimizer batches of whole groups, dealt in random order."""
    if count == 1:
        return [list(rows)]
    groups = sorted({row.group for row in rows})
    shuffle.shuffle(groups)
    dealt = [set(groups[start::count]) for start in range(count)]
    return [[row for row in rows if row.group in part] for part in dealt if part]


def split_into_micro_batches(
    rows: Sequence[TrainingRow],
    size: int | None,
    *,
    share_prompts: bool = True,
    tokens: int | None = None,
) -> list[list[TrainingRow]]:
    """Return parts of an optimizer batch that are in memory one at a time.

    Groups of similar length are together, and so are the segments of a rollout. A part has at most
    `size` rows, unless one rollout has more segments. If `size` is None, a part is as many whole
    groups as fit into `tokens` with their padding, by default those of `DeviceSizes`; a group is
    cut if it has more tokens without the prompt that its rollouts share, or with it if
    `share_prompts` is False. Groups without any signal come last, in parts of their own.
    """
    most = device_sizes().micro_batch_tokens if tokens is None else tokens
    by_number: dict[int, list[TrainingRow]] = {}
    for row in rows:
        by_number.setdefault(row.group, []).append(row)
    ordered = sorted(by_number.values(), key=lambda g: (_longest_completion(g), _longest_prompt(g)))
    parts: list[list[TrainingRow]] = []
    for signal in (True, False):
        groups = [group for group in ordered if any(row.has_signal for row in group) is signal]
        if size is None:
            parts += _fill_parts(groups, share_prompts, most)
        else:
            parts += _cut([*chain.from_iterable(groups)], size)
    return parts


def count_padded_tokens(rows: Sequence[TrainingRow], *, share_prompts: bool = True) -> int:
    """Return the tokens of a batch of these rows, padding included and shared prompts once."""
    prompts = count_prompts(rows, share_prompts=share_prompts)
    return len(rows) * _longest_completion(rows) + prompts * _longest_prompt(rows)


def count_prompts(rows: Sequence[TrainingRow], *, share_prompts: bool = True) -> int:
    """Return how many prompts a batch of these rows reads."""
    return len({_prompt_key(row) for row in rows} if share_prompts else rows)


def _prompt_key(row: TrainingRow) -> tuple[int, int, int]:
    """Return what rows with the same prompt have in common. Later segments share no prompt."""
    return row.group, row.number, row.member if row.number else 0


def make_batch(rows: Sequence[TrainingRow], totals: BatchTotals) -> Batch:
    """Return the rows as padded arrays, with the totals of the optimizer batch."""
    index = {prompt: p for p, prompt in enumerate(dict.fromkeys(row.prompt for row in rows))}
    mask = _pad_right([row.mask for row in rows], np.bool_)
    with np.errstate(over="ignore"):
        advantages = np.array([[row.advantage] for row in rows], np.float32)
    ref = [row.logp_ref for row in rows if row.logp_ref is not None]
    return Batch(
        prompts=mx.array(_pad_right(list(index), np.int32)),
        prompt_lengths=mx.array([len(prompt) for prompt in index]),
        owner=mx.array([index[row.prompt] for row in rows]),
        group=mx.array([row.group for row in rows]),
        tokens=mx.array(_pad_right([row.tokens for row in rows], np.int32)),
        mask=mx.array(mask),
        logp_sampled=mx.array(_pad_right([row.logp_sampled for row in rows], np.float32)),
        logp_old=mx.array(_pad_right([row.logp_old for row in rows], np.float32)),
        logp_ref=mx.array(_pad_right(ref, np.float32)) if ref else None,
        advantages=mx.array(np.where(mask, advantages, np.float32(0))),
        temperature=mx.array([row.rollout.sampling.temperature for row in rows], dtype=mx.float32),
        rows=totals.rows,
        token_count=totals.token_count,
        max_tokens=totals.max_tokens,
        entropies=None if totals.entropies is None else mx.array(totals.entropies),
        rollout=_rollout_numbers(rows),
    )


def _rollout_numbers(rows: Sequence[TrainingRow]) -> mx.array | None:
    """Return the number of each row's rollout, or None if each row is a whole rollout."""
    numbers = {sequence: n for n, sequence in enumerate(dict.fromkeys(r.sequence for r in rows))}
    if len(numbers) == len(rows):
        return None
    return mx.array([numbers[row.sequence] for row in rows])


def _fill_parts(
    groups: Sequence[list[TrainingRow]], share_prompts: bool, most: int
) -> list[list[TrainingRow]]:
    parts: list[list[TrainingRow]] = []
    for group in groups:
        pieces, own = [group], _count_own_tokens(group, share_prompts)
        if own > most:
            # At least two rows, because some losses compare two rows of a group.
            size = max(2, most * len(group) // own)
            pieces = _cut(sorted(group, key=lambda row: len(row.mask)), size)
        for piece in pieces:
            together = [*parts[-1], *piece] if parts else piece
            tokens = count_padded_tokens(together, share_prompts=share_prompts)
            if parts and tokens <= most:
                parts[-1] = together
            else:
                parts.append(piece)
    return parts


def _count_own_tokens(group: Sequence[TrainingRow], share_prompts: bool) -> int:
    """Return the padded tokens of a group, without the prompt that its rollouts share."""
    prompts = sum(row.number > 0 for row in group) if share_prompts else len(group)
    return len(group) * _longest_completion(group) + prompts * _longest_prompt(group)


def _cut(rows: list[TrainingRow], size: int) -> list[list[TrainingRow]]:
    """Return pieces of whole rollouts with at most `size` rows, or of one rollout with more."""
    pieces: list[list[TrainingRow]] = []
    for rollout in rows_by_rollout(rows):
        if pieces and len(pieces[-1]) + len(rollout) <= size:
            pieces[-1] += rollout
        else:
            pieces.append(rollout)
    return pieces


def _longest_completion(rows: Sequence[TrainingRow]) -> int:
    return max(len(row.tokens) for row in rows)


def _longest_prompt(rows: Sequence[TrainingRow]) -> int:
    return max(row.prompt_length for row in rows)


def _pad_right(lists: Sequence[Sequence[float] | np.ndarray], dtype: type) -> np.ndarray:
    padded = np.zeros((len(lists), max(len(row) for row in lists)), dtype)
    for r, row in enumerate(lists):
        padded[r, : len(row)] = row
    return padded

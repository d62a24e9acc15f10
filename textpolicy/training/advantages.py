"""From the rewards of a batch to the advantage of each row."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from textpolicy.errors import ConfigError
from textpolicy.training.batch import TrainingRow
from textpolicy.types import AdvantageFn, RolloutGroup


def add_advantages(
    rows: Sequence[TrainingRow], advantage_fn: AdvantageFn, asked: frozenset[str], reward_kl: float
) -> list[TrainingRow]:
    """The rows with the advantages that they have inside their groups.

    `reward_kl` is taken off each reward for every nat by which the rollout was likelier under the
    policy than under the reference: an estimate of the divergence that the rollout cost.
    """
    table = _Table(rows)
    rewards = table.of(lambda row: _reward(row, reward_kl))
    offers: dict[str, Callable[[], Any]] = {
        "lengths": lambda: table.of(lambda row: sum(row.rollout.mask)),
        "parts": lambda: table.parts(),
    }
    advantages = np.array(advantage_fn(rewards, **{name: offers[name]() for name in asked}))
    if advantages.shape != rewards.shape:
        raise ConfigError(
            f"the advantage function returned shape {advantages.shape} for rewards of shape "
            f"{rewards.shape}; expected one advantage for each reward"
        )
    return [replace(row, advantage=float(advantages[row.group, row.member])) for row in rows]


def advantages_by_group(
    groups: Sequence[RolloutGroup], rows: Sequence[TrainingRow]
) -> list[list[float | None]]:
    """The rows' advantages by group and member; None where there is no row, or a silent one."""
    table: list[list[float | None]] = [[None] * len(group.rollouts) for group in groups]
    for row in rows:
        if not row.silent:
            table[row.group][row.member] = row.advantage
    return table


def requested_keywords(advantage_fn: AdvantageFn) -> frozenset[str]:
    """Which of the offered keywords an advantage function takes; others it needs are an error."""
    offered = {"lengths", "parts"}
    _, *rest = inspect.signature(advantage_fn).parameters.values()
    needed = {p.name for p in rest if p.default is p.empty and p.kind is not p.VAR_KEYWORD}
    if needed - offered:
        raise ConfigError(
            f"the advantage function asks for {sorted(needed - offered)}; the trainer has rewards, "
            f"and by keyword {sorted(offered)}. Bind the others with functools.partial"
        )
    return frozenset(p.name for p in rest if p.name in offered)


def _reward(row: TrainingRow, reward_kl: float) -> float | None:
    reward = row.rollout.reward
    if not reward_kl or reward is None:
        return reward
    assert row.logp_ref is not None
    counted = np.array(row.rollout.mask[row.start :])
    return reward - reward_kl * float((row.old - row.logp_ref)[counted].sum())


class _Table:
    """Values of rows by group and member; NaN where a group has no such member."""

    def __init__(self, rows: Sequence[TrainingRow]) -> None:
        self._rows = rows
        self._shape = (max(r.group for r in rows) + 1, max(r.member for r in rows) + 1)

    def of(self, value: Callable[[TrainingRow], float | None]) -> mx.array:
        table = np.full(self._shape, np.nan, np.float32)
        for row in self._rows:
            if (number := value(row)) is not None:
                table[row.group, row.member] = number
        return mx.array(table)

    def parts(self) -> Mapping[str, mx.array]:
        names = dict.fromkeys(name for row in self._rows for name in row.rollout.rewards)
        return {name: self.of(lambda row, n=name: row.rollout.rewards.get(n)) for name in names}

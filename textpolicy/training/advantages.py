"""The advantages of training rows, from the rewards of their groups."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from textpolicy.errors import ConfigError
from textpolicy.training.batch import TrainingRow, rows_by_rollout
from textpolicy.types import AdvantageFn, RolloutGroup
from textpolicy.user_code import describe_value


def add_advantages(
    rows: Sequence[TrainingRow],
    advantage_fn: AdvantageFn,
    keywords: frozenset[str],
    reward_kl: float,
    *,
    group_size: int,
) -> list[TrainingRow]:
    """Return the rows with their advantages; no group has more than `group_size` rollouts.

    `keywords` are those that the advantage function requests. `reward_kl` times an estimate of the
    divergence from the reference, in nats, is subtracted from the reward of each rollout.
    """
    # The last rollouts of all groups may lack a reward, and have no row then.
    shape = (max(row.group for row in rows) + 1, group_size)
    rollouts = rows_by_rollout(rows)
    rewards = _array_of(rollouts, shape, lambda rows: _penalised_reward(rows, reward_kl))
    names = dict.fromkeys(name for row in rows for name in row.rollout.rewards)
    offered: dict[str, Callable[[], Any]] = {
        "lengths": lambda: _array_of(rollouts, shape, lambda rows: rows[0].rollout.sampled),
        "parts": lambda: {
            name: _array_of(rollouts, shape, lambda rows, n=name: rows[0].rollout.rewards.get(n))
            for name in names
        },
    }
    returned = advantage_fn(rewards, **{name: offered[name]() for name in keywords})
    advantages = _numbers_in(returned)
    if advantages.shape != rewards.shape:
        raise ConfigError(
            f"the advantage function returned shape {advantages.shape} for rewards of shape "
            f"{rewards.shape}; expected one advantage for each reward"
        )
    return [replace(row, advantage=float(advantages[row.sequence])) for row in rows]


def advantages_by_group(
    groups: Sequence[RolloutGroup], rows: Sequence[TrainingRow]
) -> list[list[float | None]]:
    """Return the advantages by group and member, with None for rollouts outside of the loss."""
    table: list[list[float | None]] = [[None] * len(group.rollouts) for group in groups]
    for row in rows:
        if not row.excluded:
            table[row.group][row.member] = row.advantage
    return table


def requested_keywords(advantage_fn: AdvantageFn) -> frozenset[str]:
    """Return the trainer's keywords that the function takes; raise if it requires other ones."""
    offered = {"lengths", "parts"}
    _, *rest = inspect.signature(advantage_fn).parameters.values()
    required = {p.name for p in rest if p.default is p.empty and p.kind is not p.VAR_KEYWORD}
    if unknown := required - offered:
        raise ConfigError(
            f"the advantage function requires the arguments {sorted(unknown)}; the trainer passes "
            f"rewards, and the keywords {sorted(offered)} on request. Bind other arguments with "
            "functools.partial"
        )
    return frozenset(p.name for p in rest if p.name in offered)


def _numbers_in(returned: Any) -> np.ndarray:
    """Return what an advantage function returned as an array of 64-bit floats."""
    # numpy has no bfloat16.
    given = returned.astype(mx.float32) if isinstance(returned, mx.array) else returned
    try:
        array = np.array(given)
    except ValueError:
        array = np.array(None)
    if array.dtype.kind not in "biuf":
        raise ConfigError(
            f"the advantage function returned {describe_value(returned)}; expected an array with "
            "one real number for each reward"
        )
    return array.astype(np.float64)


def _penalised_reward(segments: Sequence[TrainingRow], reward_kl: float) -> float | None:
    reward = segments[0].rollout.reward
    if not reward_kl or reward is None:
        return reward
    return reward - reward_kl * sum(map(_divergence, segments))


def _divergence(row: TrainingRow) -> float:
    assert row.logp_ref is not None
    sampled = np.array(row.segment.mask[row.prompt_length :])
    return float((row.logp_old - row.logp_ref)[sampled].sum())


def _array_of(
    rollouts: Sequence[Sequence[TrainingRow]],
    shape: tuple[int, int],
    value: Callable[[Sequence[TrainingRow]], float | None],
) -> mx.array:
    """Return the value of each rollout by group and member. NaN marks a member without a value."""
    array = np.full(shape, np.nan, np.float32)
    # A number beyond float32 becomes infinite: the trainer skips the update and counts it.
    with np.errstate(over="ignore"):
        for rows in rollouts:
            if (number := value(rows)) is not None:
                array[rows[0].sequence] = number
    return mx.array(array)

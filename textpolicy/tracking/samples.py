"""What the policy said in a step and what came of it, one row a completion."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from textpolicy.tracking.sink import SampleRow
from textpolicy.tracking.values import to_json_number
from textpolicy.types import Rollout, RolloutGroup

_Advantages = Sequence[Sequence[float | None]]
"""By group and member; None for a completion that was not learned from."""


def sample_rows(
    step: int, groups: Sequence[RolloutGroup], advantages: _Advantages
) -> list[SampleRow]:
    """A row for each completion of the groups that `step` learned from; texts exactly as they are.

    `group` and `member` are places in the step. `turns` is there for episodes of several turns,
    `error` where the reward function failed.
    """
    return [
        {"step": step, "group": g, "member": m, **_row(group, rollout, advantages[g][m])}
        for g, group in enumerate(groups)
        for m, rollout in enumerate(group.rollouts)
    ]


def first_whole_groups(samples: Sequence[SampleRow], rows: int) -> list[SampleRow]:
    """The first groups of a step that have at most `rows` completions together."""
    counts: dict[int, int] = {}
    for sample in samples:
        counts[sample["group"]] = counts.get(sample["group"], 0) + 1
    return list(
        islice(samples, max((total for total in _totals(counts) if total <= rows), default=0))
    )


def _totals(counts: Mapping[int, int]) -> Iterator[int]:
    total = 0
    for count in counts.values():
        total += count
        yield total


def _row(group: RolloutGroup, rollout: Rollout, advantage: float | None) -> dict[str, Any]:
    prompt = group.task.prompt
    row: dict[str, Any] = {
        "task": group.task.id,
        "prompt": prompt if isinstance(prompt, str) else [dict(message) for message in prompt],
        "completion": rollout.completion,
        "reward": rollout.reward,
        "rewards": {name: to_json_number(value) for name, value in rollout.rewards.items()},
        "advantage": advantage,
        "version": rollout.version,
        "stop_reason": rollout.stop_reason.value,
        "tokens": sum(rollout.mask),
    }
    if len(rollout.turns) > 1:
        row["turns"] = [
            {"completion": turn.completion, "reward": turn.reward, "replies": list(turn.replies)}
            for turn in rollout.turns
        ]
    return row | ({"error": rollout.error} if rollout.error else {})

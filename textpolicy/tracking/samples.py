"""Sample rows: one row for each completion of a step, with its reward and its advantage."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from textpolicy.rewards.judge_numbers import costs_of_judges
from textpolicy.tracking.named_numbers import named_numbers
from textpolicy.tracking.sink import SampleRow
from textpolicy.tracking.values import to_json_number
from textpolicy.types import Rollout, RolloutGroup
from textpolicy.untrusted.terminal import shorten_line

_ARROW = " → "
_LEAST_CHARACTERS = 10
_MOST_NUMBERS, _LONGEST_NAME = 2, 16


def sample_rows(
    step: int, groups: Sequence[RolloutGroup], advantages: Sequence[Sequence[float | None]]
) -> list[SampleRow]:
    """Return a row for each completion of the groups that `step` was trained on.

    A row has `metrics` if the reward reported numbers beside its value: each under its short name.
    `advantages` has the index of the group and then of the member; None stands for a completion
    that was not trained on. A row has `turns` in an episode of several turns, `segments` (their
    number) if the rollout has several, `error` if the reward function failed, and `versions` (the
    number of tokens of each adapter version) if the tokens are of several versions.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    reported = {key: value for rollout in rollouts for key, value in rollout.metrics.items()}
    # A rollout may lack a number that makes a name ambiguous.
    names = {number.key: number.name for number in named_numbers(reported)}
    return [
        {"step": step, "group": g, "member": m, **_row(group, rollout, advantages[g][m], names)}
        for g, group in enumerate(groups)
        for m, rollout in enumerate(group.rollouts)
    ]


def sample_line(sample: SampleRow, width: int) -> str:
    """Return a sample as one line of about `width` characters that is safe on a terminal."""
    prompt, completion, reward = sample["prompt"], sample["completion"], sample["reward"]
    asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    numbers = ["no reward" if reward is None else f"reward {float(reward):.3g}"]
    reported = sample.get("metrics", {})
    costs = costs_of_judges(reported)
    shown = ((name, value) for name, value in reported.items() if name not in costs)
    numbers += [
        f"{shorten_line(name, _LONGEST_NAME)} {float(value):.3g}"
        for name, value in islice(shown, _MOST_NUMBERS)
    ]
    end = f"  ({', '.join(numbers)})"
    room = max(2 * _LEAST_CHARACTERS, width - len(_ARROW) - len(end))
    # A short text leaves its room to the other one.
    question = shorten_line(asked, max(room // 2, room - len(completion)))
    answer = shorten_line(completion, room - len(question))
    return f"{question}{_ARROW}{answer}{end}"


def first_whole_groups(samples: Sequence[SampleRow], rows: int) -> list[SampleRow]:
    """Return the first groups of a step that together have at most `rows` completions."""
    kept = 0
    for size in Counter(sample["group"] for sample in samples).values():
        if kept + size > rows:
            break
        kept += size
    return list(samples[:kept])


def _row(
    group: RolloutGroup, rollout: Rollout, advantage: float | None, names: Mapping[str, str]
) -> dict[str, Any]:
    prompt = group.task.prompt
    row: dict[str, Any] = {
        "task": group.task.id,
        "prompt": prompt if isinstance(prompt, str) else [dict(message) for message in prompt],
        "completion": rollout.completion,
        "reward": _json(rollout.reward),
        "rewards": {name: to_json_number(value) for name, value in rollout.rewards.items()},
        "advantage": _json(advantage),
        "version": rollout.version,
        "stop_reason": rollout.stop_reason.value,
        "tokens": rollout.sampled,
    }
    if reported := {
        names[key]: to_json_number(value) for key, value in rollout.metrics.items() if key in names
    }:
        row["metrics"] = reported
    if len(rollout.turns) > 1:
        row["turns"] = [
            {
                "completion": turn.completion,
                "reward": _json(turn.reward),
                "replies": [*turn.replies],
            }
            for turn in rollout.turns
        ]
    if rollout.later:
        row["segments"] = len(rollout.segments)
    tokens = rollout.sampled_by_version
    if len(tokens) > 1:
        row["versions"] = {str(version): tokens[version] for version in sorted(tokens)}
    return row | ({"error": rollout.error} if rollout.error else {})


def _json(value: float | None) -> float | str | None:
    return None if value is None else to_json_number(value)

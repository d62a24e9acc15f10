"""Doubts about a run: its reward rose, and other numbers do not show that it learned the task."""

from collections.abc import Mapping, Sequence
from math import hypot
from statistics import fmean, stdev

from textpolicy.rewards.judge_numbers import numbers_of_judges
from textpolicy.tracking.named_numbers import named_numbers
from textpolicy.untrusted.terminal import shorten_line

EQUAL_ANSWERS = "equal_answers"
RIGHT_ANSWERS = "eval/right/"
TRAINING_ROWS, TIMES_SEEN = "data/rows", "data/times_seen"
_REWARD, _ERROR = "eval/reward", "eval/standard_error"
# Standard errors that the held-out reward must have risen, and its rise in units of the standard
# deviation of rewards in a group, because rewards have no common scale.
_SURE, _LARGE = 3.0, 0.5
# The share of what right answers have that counts as 0: a few answers are right by chance.
_NOTHING = 0.02
_FIRST_STEPS, _LAST_STEPS = 3, 10
# Times that a policy has sampled a row before it can know the row by heart, and the share of the
# training reward's rise that the held-out reward of such a policy misses.
_SEVERAL, _THIRD = 3.0, 1 / 3
_NAME_WIDTH = 40
# Shares of answers that are the same text: of nearly all, and of few enough.
_NEARLY_ALL, _FEW = 0.9, 0.5
_Rows = Sequence[Mapping[str, float]]


def find_doubts(rows: _Rows) -> list[str]:
    """Return a sentence for each sign that the policy earns more and does not do the task.

    `rows` are those of the whole run. A run whose held-out reward has not clearly risen gives only
    the doubt that it knows its training rows by heart.
    """
    measured = [row for row in rows if _REWARD in row]
    if len(measured) < 2:
        return []
    first, last = measured[0], measured[-1]
    if not _has_risen(first, last, rows):
        return _knows_rows_by_heart(rows, first, last)
    rose = f"although the held-out reward rose from {first[_REWARD]:.3f} to {last[_REWARD]:.3f}"
    known = {name.removeprefix("eval/"): 0.0 for row in rows for name in row}
    of_judges = numbers_of_judges(known)
    doubts = [
        _number_at_zero(rows, one.key, shorten_line(one.name, _NAME_WIDTH), rose)
        for one in named_numbers(known)
        if one.key not in of_judges
    ]
    return [doubt for doubt in [*doubts, _same_answer(first, last)] if doubt]


def _has_risen(first: Mapping[str, float], last: Mapping[str, float], rows: _Rows) -> bool:
    rise = last[_REWARD] - first[_REWARD]
    noise = _SURE * hypot(first.get(_ERROR, 0.0), last.get(_ERROR, 0.0))
    spread = next((row["reward_std"] for row in rows if "reward_std" in row), 0.0)
    return rise > max(noise, _LARGE * spread)


def _knows_rows_by_heart(
    rows: _Rows, first: Mapping[str, float], last: Mapping[str, float]
) -> list[str]:
    """Return the doubt about a run whose reward rises on its training rows alone.

    The last sampled reward must be above the greedy reward of held-out tasks too: samples that only
    come near the greedy answers are no sign that rows are known by heart.
    """
    rewards = [row["reward"] for row in rows if "reward" in row]
    if len(rewards) <= _FIRST_STEPS + _LAST_STEPS or last.get(TIMES_SEEN, 0.0) < _SEVERAL:
        return []
    ends = rewards[:_FIRST_STEPS], rewards[-_LAST_STEPS:]
    rise = fmean(ends[1]) - fmean(ends[0])
    noise = _SURE * hypot(*(stdev(end) / len(end) ** 0.5 for end in ends))
    gain = last[_REWARD] - first[_REWARD]
    error = 2 * hypot(first.get(_ERROR, 0.0), last.get(_ERROR, 0.0))
    flat = abs(gain) <= error and gain + error < rise and gain < _THIRD * rise
    if rise <= noise or not flat or fmean(ends[1]) <= last[_REWARD]:
        return []
    return [
        f"The reward of the training rows rose by {rise:.3f}, and that of held-out tasks by "
        f"{gain:.3f} ± {error / 2:.3f}: the policy may learn its {last[TRAINING_ROWS]:.0f} rows by "
        'heart. Take more rows or fewer steps (docs/symptoms.md, "The reward rises and the '
        'held-out reward does not")'
    ]


def _number_at_zero(rows: _Rows, key: str, shown: str, rose: str) -> str:
    """Return the doubt about a number that a reward reports, or "" if there is none.

    The number is about 0 at the end, and of right answers it is not 0. Without right answers it was
    0 at the beginning too: a number that has fallen may count faults.
    """
    sampled = [row[key] for row in rows if key in row]
    measured = [row[f"eval/{key}"] for row in rows if f"eval/{key}" in row] or sampled
    right = rows[-1].get(f"{RIGHT_ANSWERS}{key}")
    first, last = measured[0], measured[-1]
    nothing = _NOTHING * (1.0 if right is None else abs(right))
    at_end = (last, fmean(sampled[-_LAST_STEPS:] or [last]))
    if right == 0 or max(map(abs, at_end)) > nothing or (right is None and first):
        return ""
    went = "stayed at" if abs(first) <= nothing else f"went from {first:.3f} to"
    if right is None:
        return (
            f"{shown} {went} {last:.3f}, {rose}. If {shown} counts right answers, the policy "
            "earns the reward without doing the task"
        )
    return (
        f"{shown} {went} {last:.3f}, {rose}. Right answers have {right:.3f}: the policy earns the "
        "reward without doing the task"
    )


def _same_answer(first: Mapping[str, float], last: Mapping[str, float]) -> str:
    """Return the doubt about answers that became one text, as right answers are not."""
    key = f"eval/{EQUAL_ANSWERS}"
    if key not in first or key not in last:
        return ""
    before, after = first[key], last[key]
    right = last.get(f"{RIGHT_ANSWERS}{EQUAL_ANSWERS}", 0.0)
    if before >= _FEW or after < _NEARLY_ALL or right >= _FEW:
        return ""
    return (
        f"{after:.0%} of the greedy answers to held-out tasks are one and the same text, after "
        f"{before:.0%} before the run. If the tasks have different right answers, the policy no "
        "longer reads the prompts"
    )

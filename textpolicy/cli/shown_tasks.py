"""The tasks that `eval` shows: the best and the worst answers, or the gains and the losses."""

from collections.abc import Mapping, Sequence

from textpolicy.cli.answer import table
from textpolicy.environments.chat import prompt_text
from textpolicy.evaluation.compare import TaskDifference, pair_answers
from textpolicy.evaluation.evaluate import Evaluation
from textpolicy.types import Task
from textpolicy.untrusted.terminal import shorten_line

_MAX_SHOWN_CHARACTERS = 200


def lines_of_answers(tasks: Sequence[Task], evaluation: Evaluation, count: int) -> list[str]:
    """Return lines with `count` answers: half have the highest rewards, half the lowest."""
    scored = [
        (prompt_text(task.prompt), one.completion, one.reward)
        for task, one in zip(tasks, evaluation.greedy, strict=True)
        if one.reward is not None
    ]
    ordered = sorted(scored, key=lambda one: -one[2])
    blocks = [
        [("prompt", prompt), (f"reward {reward:g}", answer)] for prompt, answer, reward in ordered
    ]
    if ordered[0][2] == ordered[-1][2]:
        title = f"all {len(blocks)} tasks have the reward {ordered[0][2]:g}"
        return _section(title, blocks[:count], len(blocks))
    count = min(count, len(blocks))
    low = count // 2
    return [
        *_section("highest rewards", blocks[: count - low], len(blocks)),
        *_section("lowest rewards", blocks[len(blocks) - low :][::-1], len(blocks)),
    ]


def lines_of_differences(
    tasks: Sequence[Task], evaluations: Mapping[str, Evaluation], count: int
) -> list[str]:
    """Return lines with `count` tasks of two evaluations: the largest gains and losses.

    Half are gains and half losses, if there are so many. Tasks with equal rewards, the lowest
    first, take the places that are left.
    """
    names, (before, after) = list(evaluations), evaluations.values()
    pairs = sorted(pair_answers(tasks, before, after), key=lambda pair: -abs(pair.gain))
    gains = [pair for pair in pairs if pair.gain > 0]
    losses = [pair for pair in pairs if pair.gain < 0]
    equal = sorted((pair for pair in pairs if not pair.gain), key=lambda pair: pair.reward_after)
    # With an odd number, the one more is of the kind of the largest difference.
    lost = (count + (pairs[0].gain < 0)) // 2
    lost = min(len(losses), max(lost, count - len(gains)))
    gained = min(len(gains), count - lost)
    rest = count - gained - lost
    shown = {
        "largest gains": (gains, gained),
        "largest losses": (losses, lost),
        "equal rewards, the lowest first": (equal, rest),
    }
    return [
        line
        for title, (chosen, number) in shown.items()
        for line in _section(title, [_block(pair, names) for pair in chosen[:number]], len(chosen))
    ]


def _block(pair: TaskDifference, names: Sequence[str]) -> list[tuple[str, str]]:
    before, after = names
    return [
        ("prompt", pair.prompt),
        (f"{before} {pair.reward_before:g}", pair.before),
        (f"{after} {pair.reward_after:g}", pair.after),
    ]


def _section(title: str, blocks: Sequence[list[tuple[str, str]]], of: int) -> list[str]:
    """Return the lines of blocks under a title that says how many there are; none of none."""
    if not blocks:
        return []
    lines = ["", f"{title} ({len(blocks)} of {of} tasks):"]
    for number, block in enumerate(blocks):
        shown = table(
            [(f"  {name}", shorten_line(text, _MAX_SHOWN_CHARACTERS)) for name, text in block]
        )
        lines += [shown] if number == 0 else ["", shown]
    return lines

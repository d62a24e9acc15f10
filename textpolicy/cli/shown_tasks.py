"""The tasks that `eval` shows: the best and the worst answers, or the gains and the losses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from textpolicy.cli.answer import table
from textpolicy.environments.chat import prompt_text
from textpolicy.environments.right_answers import ReadRightAnswer
from textpolicy.errors import TaskError
from textpolicy.evaluation.evaluate import Evaluation, reported_numbers
from textpolicy.tracking.named_numbers import named_numbers, shown_numbers
from textpolicy.types import Rollout, Task
from textpolicy.untrusted.terminal import shorten_line

_MAX_SHOWN_CHARACTERS = 200


def lines_of_answers(
    tasks: Sequence[Task],
    evaluation: Evaluation,
    count: int,
    right_answer: ReadRightAnswer | None = None,
) -> list[str]:
    """Return lines with `count` answers: half have the highest rewards, half the lowest."""
    answered = _answered(tasks, {"reward": evaluation}, right_answer)
    ordered = sorted(answered, key=lambda one: -one.rewards[0])
    blocks = [one.block for one in ordered]
    if ordered[0].rewards == ordered[-1].rewards:
        title = f"all {len(blocks)} tasks have the reward {ordered[0].rewards[0]:g}"
        return _section(title, blocks[:count], len(blocks))
    count = min(count, len(blocks))
    low = count // 2
    return [
        *_section("highest rewards", blocks[: count - low], len(blocks)),
        *_section("lowest rewards", blocks[len(blocks) - low :][::-1], len(blocks)),
    ]


def lines_of_differences(
    tasks: Sequence[Task],
    evaluations: Mapping[str, Evaluation],
    count: int,
    right_answer: ReadRightAnswer | None = None,
) -> list[str]:
    """Return lines with `count` tasks of two evaluations: the largest gains and losses.

    Half are gains and half losses, if there are so many. Tasks with equal rewards, the lowest
    first, take the places that are left.
    """
    answered = _answered(tasks, evaluations, right_answer)
    pairs = sorted(answered, key=lambda one: -abs(one.gain))
    gains = [pair for pair in pairs if pair.gain > 0]
    losses = [pair for pair in pairs if pair.gain < 0]
    equal = sorted((pair for pair in pairs if not pair.gain), key=lambda pair: pair.rewards[-1])
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
        for line in _section(title, [pair.block for pair in chosen[:number]], len(chosen))
    ]


def data_of_tasks(
    tasks: Sequence[Task],
    evaluations: Mapping[str, Evaluation],
    right_answer: ReadRightAnswer | None,
) -> list[dict[str, Any]]:
    """Return each task with a reward, for programs: its right answer, and each model's answer."""
    return [one.data for one in _answered(tasks, evaluations, right_answer)]


@dataclass(frozen=True, kw_only=True)
class _Answered:
    """A task with its right answer, if that is known, and a scored greedy answer of each model."""

    task: Task
    right: str | None
    answers: Mapping[str, Rollout]

    @property
    def rewards(self) -> list[float]:
        return [one.reward for one in self.answers.values() if one.reward is not None]

    @property
    def gain(self) -> float:
        return self.rewards[-1] - self.rewards[0]

    @property
    def block(self) -> list[tuple[str, str]]:
        """The prompt, the answers and the right answer, as rows of a table."""
        rows = [("prompt", prompt_text(self.task.prompt))]
        for name, one in self.answers.items():
            rows.append((f"{name} {one.reward:g}", one.completion))
            if numbers := shown_numbers(reported_numbers(one)):
                text = ", ".join(f"{number.name} {number.value:g}" for number in numbers)
                rows.append(("  numbers", text))
        return [*rows, ("right answer", self.right)] if self.right is not None else rows

    @property
    def data(self) -> dict[str, Any]:
        answers = {
            name: {"answer": one.completion, "reward": one.reward, "numbers": _numbers(one)}
            for name, one in self.answers.items()
        }
        return {"prompt": prompt_text(self.task.prompt), "right_answer": self.right, **answers}


def _answered(
    tasks: Sequence[Task],
    evaluations: Mapping[str, Evaluation],
    right_answer: ReadRightAnswer | None,
) -> list[_Answered]:
    """Return the tasks whose answer has a reward in every evaluation."""
    answers = zip(*(one.greedy for one in evaluations.values()), strict=True)
    return [
        _Answered(
            task=task,
            right=_right(task, right_answer),
            answers=dict(zip(evaluations, rollouts, strict=True)),
        )
        for task, rollouts in zip(tasks, answers, strict=True)
        if all(one.reward is not None for one in rollouts)
    ]


def _right(task: Task, right_answer: ReadRightAnswer | None) -> str | None:
    """Return the right answer, or None if it is not known. A fault of `gold` loses no scores."""
    try:
        return right_answer(task.example) if right_answer else None
    except TaskError:
        return None


def _numbers(rollout: Rollout) -> dict[str, float]:
    """Return the numbers that the rewards gave an answer, beside the reward."""
    return {number.name: number.value for number in named_numbers(reported_numbers(rollout))}


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

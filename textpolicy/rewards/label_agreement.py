"""`compare_with_labels`: how far a reward, such as a judge, agrees with the grades of a person."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from textpolicy.activity import doing
from textpolicy.errors import ConfigError
from textpolicy.rewards.checked_rows import RowColumn, checked_rows
from textpolicy.rewards.rank_agreement import (
    PairAgreement,
    pair_agreement,
    rank_correlation,
    ranks_of,
)
from textpolicy.rewards.reward_function import Sample, sample_of
from textpolicy.rewards.scorer import scorer_of
from textpolicy.rewards.weighted_rewards import Rewards, as_rewards
from textpolicy.untrusted.terminal import shorten_line

AgreementVerdict = Literal["agrees", "unclear", "disagrees"]

# With fewer answers that a reward orders without a mistake, all resamples are without one too.
_ENOUGH_ANSWERS = 20
_ENOUGH_PAIRS = 10
_MOST_GRADES_SHOWN = 11
_SHOWN_DISAGREEMENTS = 3
_LONGEST_SHOWN = 200
_WORDS = {"true": 1.0, "yes": 1.0, "false": 0.0, "no": 0.0}
_MEANINGS: dict[AgreementVerdict, str] = {
    "agrees": "the reward prefers what you prefer more often than a guess does. Training finds "
    "what it likes and you do not, so read the answers below",
    "unclear": "these answers do not show that the reward is better than a guess. Grade at least "
    f"{_ENOUGH_ANSWERS}, and write a rubric with anchors: what earns 10, 5 and 0",
    "disagrees": "the reward prefers what you do not. Do not train on it: change the rubric, or "
    "the judge",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GradedAnswer:
    """One answer with the grade that a person gave, its `label`, and its reward."""

    row: int
    prompt: str
    completion: str
    label: float
    reward: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelAgreement:
    """How far the rewards of `answers` agree with their labels; `str()` of this is a text.

    `within_prompts` has the pairs of answers to the same prompt, which are what a run compares; it
    is None if there are fewer than ten. `rank_correlation` is Spearman's, and None if all labels
    or all rewards are equal.
    """

    name: str
    answers: Sequence[GradedAnswer]
    without_label: int
    without_reward: int
    first_error: str | None
    all_pairs: PairAgreement
    within_prompts: PairAgreement | None
    rank_correlation: float | None

    @property
    def verdict(self) -> AgreementVerdict:
        """Whether the interval of the agreement is above, around or below that of a guess."""
        if len(self.answers) < _ENOUGH_ANSWERS:
            return "unclear"
        if self.all_pairs.low > 0.5:
            return "agrees"
        return "disagrees" if self.all_pairs.high < 0.5 else "unclear"

    @property
    def mean_rewards(self) -> dict[float, float]:
        """The mean reward of the answers of each label, the lowest label first."""
        labels = sorted({one.label for one in self.answers})
        return {
            label: float(np.mean([one.reward for one in self.answers if one.label == label]))
            for label in labels
        }

    @property
    def disagreements(self) -> list[GradedAnswer]:
        """The answers that label and reward rank differently, the largest difference first."""
        labels = ranks_of(np.array([one.label for one in self.answers]))
        rewards = ranks_of(np.array([one.reward for one in self.answers]))
        apart = np.abs(labels - rewards)
        order = np.argsort(-apart, kind="stable")
        return [self.answers[place] for place in order if apart[place]]

    def __str__(self) -> str:
        lines = [
            f"reward {self.name} on {len(self.answers)} answers that you have graded",
            f"  agreement         {self.all_pairs}",
        ]
        if self.within_prompts:
            lines += [f"  within prompts    {self.within_prompts}"]
        if self.rank_correlation is not None:
            lines += [f"  rank correlation  {self.rank_correlation:.2f}"]
        counts = Counter(one.label for one in self.answers)
        if len(counts) <= _MOST_GRADES_SHOWN:
            lines += [
                f"  your grade {label:<5g}  mean reward {mean:.2f} of {counts[label]} answers"
                for label, mean in self.mean_rewards.items()
            ]
        if self.without_label:
            lines += [f"  not graded        {self.without_label} rows, which are left out"]
        if self.without_reward:
            why = f": {self.first_error}" if self.first_error else ""
            lines += [f"  no reward         {self.without_reward} answers{why}"]
        lines += ["", f"{self.verdict}: {_MEANINGS[self.verdict]}"]
        for one in self.disagreements[:_SHOWN_DISAGREEMENTS]:
            lines += [
                "",
                f"row {one.row}: you {one.label:g}, the reward {one.reward:.2f}",
                f"  prompt  {shorten_line(one.prompt, _LONGEST_SHOWN)}",
                f"  answer  {shorten_line(one.completion, _LONGEST_SHOWN)}",
            ]
        return "\n".join(lines)


@doing("comparing rewards with labels")
def compare_with_labels(
    reward: Callable[..., Any] | Rewards,
    rows: Iterable[Mapping[str, Any]],
    *,
    label: str = "label",
    completion: str = "completion",
    prompt: RowColumn = None,
) -> LabelAgreement:
    """Return how far the reward agrees with your own grades of the same answers.

    Each row has a prompt, an answer in the column `completion`, and your grade of it in the column
    `label`: a number on any scale, or true and false. Rows without a grade are left out. Only the
    order of the grades counts, so a judge's scale may be another than yours.
    """
    known = list(rows)
    graded = _graded_samples(known, label, completion, prompt)
    # One answer that cannot be scored says nothing about the others.
    rewards = replace(as_rewards(reward), on_error="skip", max_error_rate=1.0)
    with scorer_of(rewards) as scorer:
        verdicts = scorer.score([sample for sample, _ in graded.values()])
    answers = [
        GradedAnswer(
            row=number,
            prompt=sample.prompt,
            completion=sample.completion,
            label=grade,
            reward=verdict.value,
        )
        for (number, (sample, grade)), verdict in zip(graded.items(), verdicts, strict=True)
        if verdict.value is not None
    ]
    error = next((verdict.error for verdict in verdicts if verdict.error), None)
    if len({one.label for one in answers}) < 2:
        raise ConfigError(
            f"{len(answers)} of {len(graded)} graded answers have a reward, which is too few to "
            f"compare. {error or 'The reward returned None for the others'}"
        )
    return _agreement(
        " + ".join(member.name for member in rewards.members),
        answers,
        without_label=len(known) - len(graded),
        without_reward=len(graded) - len(answers),
        first_error=error,
    )


def _graded_samples(
    rows: Sequence[Mapping[str, Any]], label: str, completion: str, prompt: RowColumn
) -> dict[int, tuple[Sample, float]]:
    """Return the answers that have a grade, and their grades, by the numbers of their rows."""
    grades = {number: _read_label(row, label, number) for number, row in enumerate(rows)}
    known = {number: grade for number, grade in grades.items() if grade is not None}
    if missing := [number for number in known if completion not in rows[number]]:
        raise ConfigError(
            f"row {missing[0]} has a grade and no column {completion!r} with the graded answer; "
            f"it has {', '.join(rows[missing[0]])}. Name the column, as in --columns "
            "completion=NAME"
        )
    if len(set(known.values())) < 2:
        raise ConfigError(
            f"the column {label!r} has {len(known)} grades, and no two that differ. Grade good "
            "and bad answers, so that there is an order to compare with"
        )
    checked = checked_rows(rows, prompt=prompt)
    samples = {
        number: sample_of(checked[number].prompt, str(rows[number][completion]), rows[number])
        for number in known
    }
    return {
        number: (replace(sample, id=f"row {number}"), known[number])
        for number, sample in samples.items()
    }


def _agreement(name: str, answers: Sequence[GradedAnswer], **counts: Any) -> LabelAgreement:
    labels = np.array([one.label for one in answers])
    rewards = np.array([one.reward for one in answers])
    prompts = np.array([hash(one.prompt) for one in answers])
    same_prompt = prompts[:, None] == prompts[None, :]
    every_pair = np.ones_like(same_prompt)
    all_pairs = pair_agreement(labels, rewards, every_pair)
    within = pair_agreement(labels, rewards, same_prompt)
    assert all_pairs
    return LabelAgreement(
        name=name,
        answers=answers,
        all_pairs=all_pairs,
        within_prompts=within if within and within.pairs >= _ENOUGH_PAIRS else None,
        rank_correlation=rank_correlation(labels, rewards),
        **counts,
    )


def _read_label(row: Mapping[str, Any], column: str, number: int) -> float | None:
    """Return the grade of a row as a number, or None if it has none yet."""
    value = row.get(column)
    if value is None or (isinstance(value, str) and not value.strip()):
        if column not in row and number == 0:
            raise ConfigError(
                f"no column {column!r} of your grades; the rows have {', '.join(row)}. Add a "
                "column with a number for each answer that you have judged"
            )
        return None
    try:
        grade = _WORDS.get(str(value).strip().lower())
        grade = float(value) if grade is None else grade
    except (TypeError, ValueError):
        grade = np.nan
    if not np.isfinite(grade):
        raise ConfigError(
            f"row {number} has the grade {value!r:.60} in the column {column!r}; expected a "
            "number, true or false, or nothing if you have not graded it"
        )
    return grade

"""`check_signal`: whether a model gets a signal from a task, seen in answers that it samples."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from textpolicy.rewards.checked_rows import CheckedRow
from textpolicy.rewards.reward_function import Sample, sample_of
from textpolicy.rewards.scorer import Scorer
from textpolicy.rewards.thoughts import thought_fields
from textpolicy.types import Completion, StopReason

CompletionSampler = Callable[[Sequence[Any]], Sequence[Sequence[str | Completion]]]
"""Takes prompts and returns a group of completions for each, or for the first of them."""

SignalVerdict = Literal["good", "too easy", "too hard", "answers cut off"]

# With a smaller share, most steps of four groups have fewer than one group to learn from.
_ENOUGH_GROUPS = 0.25
MANY_CUT = 0.5
_LONGEST_SHOWN = 200
_REASONS: dict[SignalVerdict, str] = {
    "good": "the answers of a group often earn different rewards, which is what the model learns "
    "from",
    "too easy": "most answers already earn the same high reward, so that little is left to learn",
    "too hard": "most groups have answers of one low reward, from which the model learns nothing",
    "answers cut off": "most answers reach the limit of tokens before their end, so their rewards "
    "say little about the model",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SignalCheck:
    """What a model's answers earn. `greedy` is the mean of `greedy_rows` greedy answers.

    `differing` groups of `groups` hold different rewards. `cut` is the share of the sampled answers
    that reached the limit of tokens. `shown` has a few answers with their rewards.
    """

    verdict: SignalVerdict
    groups: int
    group_size: int
    differing: int
    mean: float
    cut: float
    greedy: float | None
    greedy_rows: int
    shown: Sequence[tuple[str, float | None]]

    def __str__(self) -> str:
        first = (
            f"  first greedy score  {self.greedy or 0:.3f} on average over {self.greedy_rows} rows"
        )
        greedy = [] if self.greedy is None else [first]
        lines = [
            "what this model earns:",
            *greedy,
            f"  mean reward         {self.mean:.3f} of sampled answers",
            f"  groups with signal  {self.differing} of {self.groups}: the rewards of their "
            f"{self.group_size} answers differ",
            f"  answers cut off     {self.cut:.0%}",
            *(f"  sampled answer      {text!r} earns {value}" for text, value in self.shown),
            f"{self.verdict}: {_REASONS[self.verdict]}",
        ]
        return "\n".join(lines)


def check_signal(
    scorer: Scorer,
    rows: Sequence[CheckedRow],
    sample: CompletionSampler,
    greedy: CompletionSampler | None,
    right: float,
) -> SignalCheck:
    """Return what the sampled groups and the greedy answers earn; `right` is the highest reward."""
    prompts = [row.asked or row.prompt for row in rows]
    groups = sample(prompts)
    rewards = [_score(scorer, row, group) for row, group in zip(rows, groups, strict=False)]
    firsts = greedy(prompts[: len(groups)]) if greedy else []
    first = [_score(scorer, row, group)[0] for row, group in zip(rows, firsts, strict=False)]
    values = [value for group in rewards for value in group if value is not None]
    differing = sum(len({value for value in group if value is not None}) > 1 for group in rewards)
    completions = [completion for group in groups for completion in group]
    cut = sum(_is_cut(completion) for completion in completions) / len(completions)
    mean = _mean(values)
    return SignalCheck(
        verdict=_judge(differing / len(groups), mean, cut, right),
        groups=len(groups),
        group_size=len(groups[0]),
        differing=differing,
        mean=mean,
        cut=cut,
        greedy=_mean([value for value in first if value is not None]) if first else None,
        greedy_rows=len(first),
        shown=_choose_shown(groups, rewards),
    )


def _judge(share: float, mean: float, cut: float, right: float) -> SignalVerdict:
    # A reward that tells cut answers apart teaches too, and that an answer must end.
    if share >= _ENOUGH_GROUPS:
        return "good"
    if cut > MANY_CUT:
        return "answers cut off"
    return "too easy" if mean > right / 2 else "too hard"


def _score(
    scorer: Scorer, row: CheckedRow, group: Sequence[str | Completion]
) -> list[float | None]:
    return [verdict.value for verdict in scorer.score([_sample(row, one) for one in group])]


def _sample(row: CheckedRow, completion: str | Completion) -> Sample:
    if isinstance(completion, str):
        return sample_of(row.prompt, completion, row.example)
    fields = thought_fields(
        completion.text,
        in_thought=completion.in_thought,
        thought=completion.thought,
        answer=completion.answer,
    )
    return sample_of(row.prompt, completion.text, row.example, **fields)


def _is_cut(completion: str | Completion) -> bool:
    return isinstance(completion, Completion) and completion.stop_reason is StopReason.LENGTH


def _choose_shown(
    groups: Sequence[Sequence[str | Completion]], rewards: Sequence[Sequence[float | None]]
) -> list[tuple[str, float | None]]:
    """Return an answer with the lowest reward, and one with the highest if that is another."""
    scored = [
        (completion if isinstance(completion, str) else completion.text, value)
        for group, values in zip(groups, rewards, strict=True)
        for completion, value in zip(group, values, strict=True)
    ]
    order = sorted(scored, key=lambda one: float("-inf") if one[1] is None else one[1])
    chosen = order[:1] if order[0][1] == order[-1][1] else [order[0], order[-1]]
    return [(text[:_LONGEST_SHOWN], value) for text, value in chosen]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0

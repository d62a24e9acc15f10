"""`check_signal`: whether a model gets a signal from a task, seen in answers that it samples."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Literal

from textpolicy.rewards.checked_rows import CheckedRow
from textpolicy.rewards.judge_numbers import costs_of_judges, numbers_of_judges
from textpolicy.rewards.reward_function import Sample, sample_of
from textpolicy.rewards.scorer import Scorer, Verdict
from textpolicy.rewards.thoughts import thought_fields
from textpolicy.types import Completion, StopReason
from textpolicy.untrusted.terminal import shorten_line

CompletionSampler = Callable[[Sequence[Any]], Sequence[Sequence[str | Completion]]]
"""Takes prompts and returns a group of completions for each, or for the first of them."""

SignalVerdict = Literal["good", "too easy", "too hard", "answers cut off"]

# With a smaller share, most steps of four groups have fewer than one group to learn from.
_ENOUGH_GROUPS = 0.25
MANY_CUT = 0.5
# A share of groups from which rewards are said to differ often.
_OFTEN = 0.5
# Answers to read where no right answer is known.
_READ = 8
_LINE_WIDTH = 120
# Rewards that are sums of weighted parts differ by rounding.
_ROUNDING = 1e-6
_REASONS: dict[SignalVerdict, str] = {
    "good": "the answers of a group often earn different rewards, which is what the model learns "
    "from",
    "too easy": "most answers already earn the same high reward, so that little is left to learn",
    "too hard": "most groups have answers of one low reward, from which the model learns nothing",
    "answers cut off": "most answers reach the limit of tokens before their end, so their rewards "
    "say little about the model",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledAnswer:
    """A sampled answer with its prompt, its reward and numbers, and the right answer."""

    prompt: str
    answer: str
    reward: float | None
    numbers: Mapping[str, float]
    right_answer: str | None
    right_reward: float | None

    @property
    def excess(self) -> float:
        """How much more the answer earns than the right one; at most 0 if that is not known."""
        if self.reward is None or self.right_reward is None:
            return 0.0
        return self.reward - self.right_reward - _ROUNDING

    @property
    def lines(self) -> list[str]:
        """The answer as lines of a table."""
        costs = costs_of_judges(self.numbers)
        numbers = ", ".join(
            f"{name} {value:g}" for name, value in self.numbers.items() if name not in costs
        )
        right = [] if self.right_answer is None else [("right answer", _line(self.right_answer))]
        earned = "nothing is scored" if self.reward is None else f"{self.reward:g}"
        rows = [
            *[("sampled answer", _line(self.answer)), ("  to the prompt", _line(self.prompt))],
            *[(f"  {name}", text) for name, text in right],
            ("  earns", f"{earned} ({numbers})" if numbers else earned),
        ]
        return [f"  {name:<19} {text}" for name, text in rows]


@dataclass(frozen=True, slots=True, kw_only=True)
class SignalCheck:
    """What a model's answers earn. `greedy` is the mean of `greedy_rows` greedy answers.

    `differing` groups of `groups` hold different rewards. `cut` is the share of the sampled answers
    that reached the limit of tokens. `shown` has a few answers with their rewards. `above_right`
    answers earn more than the right ones, `highest` the most more. `at_zero` are the numbers that
    the reward reports as 0 for all answers, with what right answers have, or None.
    """

    verdict: SignalVerdict
    groups: int
    group_size: int
    differing: int
    mean: float
    cut: float
    greedy: float | None
    greedy_rows: int
    shown: Sequence[SampledAnswer]
    above_right: int = 0
    highest: SampledAnswer | None = None
    at_zero: Mapping[str, float | None] = field(default_factory=dict[str, float | None])

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
            *(line for one in self.shown for line in one.lines),
            f"{self.verdict}: {self._reason}",
            *(self._describe_zero(name, right) for name, right in self.at_zero.items()),
        ]
        return "\n".join(lines)

    @property
    def _reason(self) -> str:
        if self.verdict != "good" or self.differing >= _OFTEN * self.groups:
            return _REASONS[self.verdict]
        return (
            f"the answers of {self.differing} of {self.groups} groups earn different rewards, "
            "which is enough to begin with. The model learns nothing from the other groups; larger "
            "groups (--group-size) differ more often"
        )

    def _describe_zero(self, name: str, right: float | None) -> str:
        count = self.groups * self.group_size
        if right is None:
            known, wanted = "", f"if {name} counts right answers"
        else:
            known, wanted = f", and {right:g} for right answers", "so"
        return (
            f"but {name} is 0 for each of {count} sampled answers{known}: {wanted}, the model can "
            "earn more without ever giving a right answer. Take easier rows, or show the model "
            "demonstrations first (textpolicy sft)"
        )


def check_signal(
    scorer: Scorer,
    rows: Sequence[CheckedRow],
    sample: CompletionSampler,
    greedy: CompletionSampler | None,
    rights: Sequence[Verdict | None],
) -> SignalCheck:
    """Return what the sampled groups and the greedy answers earn.

    `rights` are the verdicts on the right answers of the rows, or None where none is known.
    """
    prompts = [row.asked or row.prompt for row in rows]
    groups = sample(prompts)
    answers_G = [
        _answers(row, right, group, _score(scorer, row, group))
        for row, right, group in zip(rows, rights, groups, strict=False)
    ]
    rewards = [[one.reward for one in answers] for answers in answers_G]
    firsts = greedy(prompts[: len(groups)]) if greedy else []
    first = [_score(scorer, row, group)[0].value for row, group in zip(rows, firsts, strict=False)]
    values = [value for group in rewards for value in group if value is not None]
    differing = sum(len({value for value in group if value is not None}) > 1 for group in rewards)
    completions = [completion for group in groups for completion in group]
    cut = sum(_is_cut(completion) for completion in completions) / len(completions)
    mean = _mean(values)
    answers = [one for of_row in answers_G for one in of_row]
    right_rewards = [one.value for one in rights if one and one.value is not None]
    right = fmean(right_rewards) if right_rewards else 1.0
    verdict = _judge(differing / len(groups), mean, cut, right)
    above = sorted((one for one in answers if one.excess > 0), key=lambda one: -one.excess)
    return SignalCheck(
        verdict=verdict,
        groups=len(groups),
        group_size=len(groups[0]),
        differing=differing,
        mean=mean,
        cut=cut,
        greedy=_mean([value for value in first if value is not None]) if first else None,
        greedy_rows=len(first),
        shown=_choose_shown(answers) if any(rights) else _choose_to_read(answers_G),
        above_right=len(above),
        highest=above[0] if above else None,
        # In a task that is too hard all numbers may be 0.
        at_zero=_numbers_at_zero(answers, rights) if verdict == "good" else {},
    )


def _judge(share: float, mean: float, cut: float, right: float) -> SignalVerdict:
    # A reward that tells cut answers apart teaches too, and that an answer must end.
    if share >= _ENOUGH_GROUPS:
        return "good"
    if cut > MANY_CUT:
        return "answers cut off"
    return "too easy" if mean > right / 2 else "too hard"


def _score(scorer: Scorer, row: CheckedRow, group: Sequence[str | Completion]) -> list[Verdict]:
    return scorer.score([_sample(row, one) for one in group])


def _answers(
    row: CheckedRow,
    right: Verdict | None,
    group: Sequence[str | Completion],
    verdicts: Sequence[Verdict],
) -> list[SampledAnswer]:
    return [
        SampledAnswer(
            prompt=row.prompt,
            answer=one if isinstance(one, str) else one.text,
            reward=verdict.value,
            numbers=_numbers(verdict),
            right_answer=row.gold,
            right_reward=right.value if right else None,
        )
        for one, verdict in zip(group, verdicts, strict=True)
    ]


def _numbers(verdict: Verdict) -> dict[str, float]:
    """Return what rewards report beside the reward and, of several rewards, the value of each."""
    if len(verdict.parts) > 1:
        return {**verdict.parts, **verdict.metrics}
    return {name.partition("/")[2]: value for name, value in verdict.metrics.items()}


def _numbers_at_zero(
    answers: Sequence[SampledAnswer], rights: Sequence[Verdict | None]
) -> dict[str, float | None]:
    """Return the numbers that are 0 for all answers, unless right answers have 0 as well."""
    names = dict.fromkeys(name for one in answers for name in one.numbers)
    of_judges = numbers_of_judges(names)
    zero = [
        name
        for name in names
        if name not in of_judges and not any(one.numbers.get(name) for one in answers)
    ]
    of_right = [_numbers(one) for one in rights if one and not one.error]
    known = {name: [one[name] for one in of_right if name in one] for name in zero}
    means = {name: fmean(values) if values else None for name, values in known.items()}
    return {name: value for name, value in means.items() if value != 0}


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


def _choose_shown(answers: Sequence[SampledAnswer]) -> list[SampledAnswer]:
    """Return an answer with the lowest reward, and one with the highest if that is another."""
    order = sorted(answers, key=lambda one: float("-inf") if one.reward is None else one.reward)
    return order[:1] if order[0].reward == order[-1].reward else [order[0], order[-1]]


def _choose_to_read(answers_G: Sequence[Sequence[SampledAnswer]]) -> list[SampledAnswer]:
    """Return answers of several prompts, by their rewards: nothing but reading tells their worth.

    The answers with the lowest and the highest reward are among them.
    """
    chosen = _choose_shown([one for answers in answers_G for one in answers])
    others = [answers[0] for answers in answers_G if not any(one in chosen for one in answers)]
    chosen += others[: _READ - len(chosen)]
    return sorted(chosen, key=lambda one: float("-inf") if one.reward is None else one.reward)


def _line(text: str) -> str:
    return shorten_line(text, _LINE_WIDTH) or "(empty)"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0

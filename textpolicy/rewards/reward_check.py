"""A reward tried before a run: what it does to right, wrong and empty answers."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, Literal

from textpolicy.errors import ConfigError
from textpolicy.rewards.reward_function import Sample, sample_of
from textpolicy.rewards.scorer import Scorer, Verdict
from textpolicy.rewards.weighted_rewards import Rewards, as_rewards

PROMPT_COLUMNS = ("prompt", "question", "problem", "instruction", "input")
GOLD_COLUMNS = ("gold", "answer", "solution", "target", "completion", "output")
DEFAULT_ROWS = 64
"""How many rows are tried unless asked for more."""
_SLOW_SECONDS = 0.1
_NOISE = "I am not sure, but it could be 3, or (B), or perhaps something else entirely."

Column = str | Callable[[Mapping[str, Any]], Any] | None
Sampler = Callable[[Sequence[str]], Sequence[Sequence[str]]]
"""Prompts to a group of completions for each: what a policy would say now."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of a check. A warning is nothing that training could not go on with."""

    name: str
    verdict: Literal["ok", "warning", "FAILED", "not checked"]
    detail: str


@dataclass(frozen=True, slots=True)
class RewardCheck:
    """What was found; `str()` of it is a table."""

    title: str
    findings: Sequence[Finding]

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return all(finding.verdict != "FAILED" for finding in self.findings)

    def __str__(self) -> str:
        lines = [f"  {f.name:<14} {f.verdict:<11} {f.detail}".rstrip() for f in self.findings]
        return "\n".join([self.title, *lines])


@dataclass(frozen=True, slots=True)
class Case:
    """A prompt with its row, and a right answer if one is known."""

    prompt: str
    example: Mapping[str, Any]
    gold: str | None = None


def check_reward(
    reward: Callable[..., Any] | Rewards,
    rows: Iterable[Mapping[str, Any]],
    *,
    prompt: Column = None,
    gold: Column = None,
    sample: Sampler | None = None,
    limit: int = DEFAULT_ROWS,
) -> RewardCheck:
    """Try a reward on up to `limit` rows: `print(check_reward(close, rows))`.

    `prompt` and `gold` are columns, or functions of a row; left out, the first of PROMPT_COLUMNS
    and of GOLD_COLUMNS that the rows have. `sample` adds how often a policy would see a difference.
    """
    chosen = [row for _, row in zip(range(limit), rows, strict=False)]
    if not chosen:
        raise ConfigError("there are no rows to try the reward on; expected at least one")
    prompt = prompt or _first_of(PROMPT_COLUMNS, chosen[0])
    gold = gold or _first_of(GOLD_COLUMNS, chosen[0])
    cases = [
        Case(_text(row, prompt) or "", row, None if gold is None else _text(row, gold))
        for row in chosen
    ]
    return check_cases(reward, cases, sample=sample)


def check_cases(
    reward: Callable[..., Any] | Rewards, cases: Sequence[Case], *, sample: Sampler | None = None
) -> RewardCheck:
    """`check_reward` for prompts and right answers that come from elsewhere than from columns."""
    # Every fault is to be seen, so none may end the check.
    rewards = replace(as_rewards(reward), on_error="skip", max_error_rate=1.0)
    with closing(Scorer(rewards)) as scorer:
        trials = [_Trial.of(scorer, cases, number) for number in range(len(cases))]
        findings = [
            _finite(trials),
            _deterministic(trials),
            *_gold_findings(trials),
            _speed(trials),
            _signal(scorer, cases, sample),
        ]
    names = " + ".join(member.name for member in rewards.members)
    return RewardCheck(f"reward {names} on {len(cases)} rows", findings)


@dataclass(frozen=True, slots=True)
class _Trial:
    """A row with the answers that were tried on it, by what they are, and their verdicts."""

    number: int
    samples: Mapping[str, Sample]
    verdicts: Mapping[str, Verdict]
    again: Sequence[Verdict]
    seconds: float

    @classmethod
    def of(cls, scorer: Scorer, cases: Sequence[Case], number: int) -> "_Trial":
        case = cases[number]
        others = [other.gold for other in (*cases[number + 1 :], *cases[:number])]
        other = next((gold for gold in others if gold is not None and gold != case.gold), None)
        texts = {
            "the right answer": case.gold,
            "no answer": "",
            "another row's answer": other,
            "the prompt again": case.prompt,
            "a guess at everything": _NOISE,
        }
        samples = {
            what: replace(sample_of(case.prompt, text, case.example), id=f"row {number}")
            for what, text in texts.items()
            if text is not None
        }
        verdicts = scorer.score(list(samples.values()))
        # The second time tells the time: the first may have started processes.
        before = scorer.seconds
        again = scorer.score(list(samples.values()))
        seconds = (scorer.seconds - before) / len(samples)
        return cls(number, samples, dict(zip(samples, verdicts, strict=True)), again, seconds)

    def value(self, what: str) -> float | None:
        verdict = self.verdicts.get(what)
        return verdict.value if verdict else None


def _finite(trials: Sequence[_Trial]) -> Finding:
    verdicts = [verdict for trial in trials for verdict in trial.verdicts.values()]
    errors = [verdict.error for verdict in verdicts if verdict.error]
    if errors:
        return Finding("finite", "FAILED", f"{len(errors)} of {len(verdicts)} calls: {errors[0]}")
    declined = sum(verdict.value is None for verdict in verdicts)
    if declined == len(verdicts):
        return Finding(
            "finite", "FAILED", f"None for each of {declined} answers: nothing is scored"
        )
    detail = f"{len(verdicts)} calls" + (f", {declined} of them None" if declined else "")
    return Finding("finite", "ok", detail)


def _deterministic(trials: Sequence[_Trial]) -> Finding:
    for trial in trials:
        for (what, first), second in zip(trial.verdicts.items(), trial.again, strict=True):
            if first.value != second.value:
                detail = f"row {trial.number}, {what}: {first.value}, then {second.value}"
                return Finding("deterministic", "warning", detail)
    return Finding("deterministic", "ok", "the same again the second time")


def _gold_findings(trials: Sequence[_Trial]) -> list[Finding]:
    known = [trial for trial in trials if "the right answer" in trial.samples]
    if not known:
        detail = f"no right answers: name their column; looked for {', '.join(GOLD_COLUMNS)}"
        return [Finding(name, "not checked", detail) for name in ("gold highest", "empty low")]
    return [_gold_highest(known), _empty_low(known)]


def _gold_highest(trials: Sequence[_Trial]) -> Finding:
    unscored = [trial for trial in trials if trial.value("the right answer") is None]
    beaten = [(trial, what) for trial in trials if (what := _beats_gold(trial))]
    if beaten:
        trial, what = beaten[0]
        detail = (
            f"{len(beaten)} of {len(trials)} rows: in row {trial.number} {what} scores "
            f"{trial.value(what):g}, the right answer {trial.value('the right answer'):g}"
        )
        return Finding("gold highest", "FAILED", detail)
    rivals = [trial for trial in trials if "another row's answer" in trial.samples]
    if rivals and all(_ties_gold(trial) for trial in rivals):
        detail = "another row's answer always scores the same: right and wrong look alike"
        return Finding("gold highest", "warning", detail)
    detail = f"in {len(trials) - len(unscored)} of {len(trials)} rows"
    return Finding("gold highest", "warning" if unscored else "ok", detail)


def _beats_gold(trial: _Trial) -> str | None:
    gold = trial.value("the right answer")
    if gold is None:
        return None
    values = {what: trial.value(what) for what in trial.samples}
    return next(
        (what for what, value in values.items() if value is not None and value > gold), None
    )


def _ties_gold(trial: _Trial) -> bool:
    return trial.value("another row's answer") == trial.value("the right answer")


def _empty_low(trials: Sequence[_Trial]) -> Finding:
    high = [
        trial
        for trial in trials
        if (empty := trial.value("no answer")) is not None
        and (gold := trial.value("the right answer")) is not None
        and empty >= gold
    ]
    if high:
        value = high[0].value("no answer")
        detail = (
            f"{len(high)} of {len(trials)} rows: in row {high[0].number} no answer at all scores "
            f"{value:g}, as much as the right one"
        )
        return Finding("empty low", "FAILED", detail)
    values = Counter(trial.value("no answer") for trial in trials)
    return Finding("empty low", "ok", f"mostly {values.most_common(1)[0][0]}")


def _speed(trials: Sequence[_Trial]) -> Finding:
    slowest = max(trials, key=lambda trial: trial.seconds)
    usual = median(trial.seconds for trial in trials)
    detail = f"{1e3 * usual:.2g} ms a call, {1e3 * slowest.seconds:.2g} ms in row {slowest.number}"
    return Finding("speed", "warning" if slowest.seconds > _SLOW_SECONDS else "ok", detail)


def _signal(scorer: Scorer, cases: Sequence[Case], sample: Sampler | None) -> Finding:
    if sample is None:
        return Finding("signal", "not checked", "no policy to sample from")
    differ, values = 0, list[float]()
    groups = sample([case.prompt for case in cases])
    for case, texts in zip(cases, groups, strict=True):
        verdicts = scorer.score([sample_of(case.prompt, text, case.example) for text in texts])
        scored = [verdict.value for verdict in verdicts if verdict.value is not None]
        values += scored
        differ += len(set(scored)) > 1
    mean = f"{sum(values) / len(values):.3g}" if values else "none"
    detail = f"{differ} of {len(cases)} groups of {len(groups[0])} differ; mean reward {mean}"
    return Finding("signal", "ok" if differ else "warning", detail)


def _first_of(names: Sequence[str], row: Mapping[str, Any]) -> str | None:
    return next((name for name in names if name in row), None)


def _text(row: Mapping[str, Any], column: Column) -> str | None:
    if column is None:
        return None
    if not isinstance(column, str):
        return str(column(row))
    if column not in row:
        raise ConfigError(f"no column {column!r}; the rows have {', '.join(row)}")
    value = row[column]
    return value if isinstance(value, str) else str(value)

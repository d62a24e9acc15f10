"""`check_reward`: try a reward on right, wrong and empty answers before a run."""

import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isnan, nan
from statistics import median
from typing import Any, Literal

from textpolicy.activity import doing
from textpolicy.errors import ConfigError
from textpolicy.rewards.checked_rows import GOLD_COLUMNS, CheckedRow, RowColumn, checked_rows
from textpolicy.rewards.judge_numbers import CACHED, numbers_of_judges
from textpolicy.rewards.reward_function import sample_of
from textpolicy.rewards.scorer import Scorer, Verdict, scorer_of
from textpolicy.rewards.signal_check import CompletionSampler, SignalCheck, check_signal
from textpolicy.rewards.weighted_rewards import Rewards, as_rewards

_DEFAULT_ROWS = 64
_SLOW_SECONDS = 0.1
# Seconds on a row without a single reward after which no further row is tried.
_FAILED_SECONDS = 1.0
_RIGHT, _EMPTY, _OTHER_ROW = "the right answer", "no answer", "another row's answer"
_PROMPT, _PROMPT_AS_ANSWER = "the prompt again", "the prompt as the answer"
_OTHER_AS_ANSWER = "another row's answer in a sentence"
# The words around an answer may earn a share of their own.
_SENTENCES = (_PROMPT_AS_ANSWER, _OTHER_AS_ANSWER)
_CALCULATION = re.compile(r"[0-9(][0-9 .,()^]*[-+*/\u00d7\u00f7][-+*/\u00d7\u00f70-9 .,()^]*[0-9)]")
_LONGEST_QUOTE = 60
_LONGEST_PROMPT = 10_000
_NO_VALUE = "no call has returned a value"
_GUESSES = "I am not sure, but it could be 3, or (B), or perhaps something else entirely."


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of a check. Training is possible despite a warning."""

    name: str
    verdict: Literal["ok", "warning", "FAILED", "not checked"]
    detail: str


@dataclass(frozen=True, slots=True)
class RewardCheck:
    """All findings about one reward, and what a model earns; `str()` of this is a table."""

    title: str
    findings: Sequence[Finding]
    signal: SignalCheck | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return all(finding.verdict != "FAILED" for finding in self.findings)

    def __str__(self) -> str:
        lines = [f"  {f.name:<14} {f.verdict:<11} {f.detail}".rstrip() for f in self.findings]
        earned = [f"\n{self.signal}"] if self.signal else []
        return "\n".join([self.title, *lines, *earned])


def check_reward(
    reward: Callable[..., Any] | Rewards,
    rows: Iterable[Mapping[str, Any] | CheckedRow],
    *,
    prompt: RowColumn = None,
    gold: RowColumn = None,
    sample: CompletionSampler | None = None,
    greedy: CompletionSampler | None = None,
    limit: int = _DEFAULT_ROWS,
) -> RewardCheck:
    """Return what a trial on up to `limit` rows found: `print(check_reward(close, rows))`.

    `prompt` and `gold` are columns or functions of a row. By default they are the first of the
    usual names, such as "question" and "answer", that the rows have. With `sample`, the check also
    tells whether the model gets a signal: how often the rewards of a group of sampled completions
    differ. `greedy` returns groups of one greedy completion, for the first greedy score.
    """
    chosen = [row for _, row in zip(range(limit), rows, strict=False)]
    if not chosen:
        raise ConfigError("there are no rows to try the reward on; expected at least one")
    checked = checked_rows(chosen, prompt=prompt, gold=gold)
    # The check shows all errors, and no error may end the check.
    rewards = replace(as_rewards(reward), on_error="skip", max_error_rate=1.0)
    before = _Process()
    with scorer_of(rewards) as scorer:
        trials = _try_rows(scorer, checked)
        findings = [
            _check_finite(trials, len(checked) - len(trials)),
            *_check_values(trials),
            _check_process(scorer, before),
        ]
        signal = None
        failed = [finding.name for finding in findings if finding.verdict == "FAILED"]
        # Sampling takes long, and says nothing about a reward that is wrong.
        if sample and not failed:
            rights = [trial.verdicts.get(_RIGHT) for trial in trials]
            signal = check_signal(scorer, checked, sample, greedy, rights)
            findings = [_with_sampled(finding, signal) for finding in findings]
        findings.append(_find_signal(signal, len(checked), failed))
    names = " + ".join(member.name for member in rewards.members)
    title = names if names == "reward" else f"reward {names}"
    return RewardCheck(f"{title} on {len(trials)} rows", findings, signal)


@dataclass(frozen=True, slots=True)
class _Trial:
    """The answers that were tried on one row, with the verdicts of two calls, by kind of answer."""

    number: int
    texts: Mapping[str, str]
    verdicts: Mapping[str, Verdict]
    repeated: Sequence[Verdict]
    seconds: float

    @property
    def failed_slowly(self) -> bool:
        """Whether each call of the row failed, so late that further rows would take too long."""
        failed = all(verdict.error for verdict in self.verdicts.values())
        return failed and self.seconds * len(self.verdicts) > _FAILED_SECONDS

    def quote(self, kind: str) -> str:
        """Return the beginning of this kind of answer, on one line."""
        return _quote(self.texts[kind])

    def value(self, kind: str) -> float:
        """Return the reward of this kind of answer, or NaN, which makes comparisons False."""
        value = self.verdicts[kind].value if kind in self.verdicts else None
        return nan if value is None else value


def _try_rows(scorer: Scorer, rows: Sequence[CheckedRow]) -> list[_Trial]:
    """Return a trial of each row, or of the rows up to one whose calls all failed slowly."""
    trials: list[_Trial] = []
    with doing("trying the reward on rows", len(rows)) as activity:
        for number in range(len(rows)):
            trials.append(_try_answers(scorer, rows, number))
            activity.advance()
            if trials[-1].failed_slowly:
                break
    return trials


def _try_answers(scorer: Scorer, rows: Sequence[CheckedRow], number: int) -> _Trial:
    row = rows[number]
    other_golds = [other.gold for other in (*rows[number + 1 :], *rows[:number])]
    other = next((gold for gold in other_golds if gold not in (None, row.gold)), None)
    texts = {
        _RIGHT: row.gold,
        _EMPTY: "",
        _OTHER_ROW: other,
        _PROMPT: row.prompt,
        _PROMPT_AS_ANSWER: f"The answer is {_asked_in(row.prompt)}",
        _OTHER_AS_ANSWER: other and f"The answer is {other}",
        "a guess at everything": _GUESSES,
    }
    samples = {
        kind: replace(sample_of(row.prompt, text, row.example), id=f"row {number}")
        for kind, text in texts.items()
        if text is not None
    }
    before = scorer.seconds
    verdicts = repeated = scorer.score(list(samples.values()))
    first = scorer.seconds - before
    if not all(verdict.error for verdict in verdicts):
        # Only the second call is timed, because the first may have started processes.
        before = scorer.seconds
        repeated = scorer.score(list(samples.values()))
    seconds = (scorer.seconds - before) / len(samples)
    if all(map(_was_cached, repeated)):
        # A judge is asked in the first call alone, and only what it has not answered before.
        asked = sum(not _was_cached(verdict) for verdict in verdicts)
        seconds = first / asked if asked else nan
    tried = {kind: text for kind, text in texts.items() if text is not None}
    return _Trial(number, tried, dict(zip(samples, verdicts, strict=True)), repeated, seconds)


def _was_cached(verdict: Verdict) -> bool:
    """Return whether a judge gave this verdict without being asked."""
    of_judges = numbers_of_judges(verdict.metrics)
    return any(verdict.metrics[name] for name in of_judges if name.endswith(f"/{CACHED}"))


def _check_finite(trials: Sequence[_Trial], rows_left: int) -> Finding:
    verdicts = [verdict for trial in trials for verdict in trial.verdicts.values()]
    errors = [verdict.error for verdict in verdicts if verdict.error]
    unscored = sum(verdict.value is None for verdict in verdicts)
    note = next((one.note for one in verdicts if one.note and one.value is None), "")
    said = f"; the first: {note}" if note else ""
    if errors:
        detail = f"{len(errors)} of {len(verdicts)} calls: {errors[0]}"
        if rows_left:
            last = trials[-1]
            detail += (
                f"\n  The other {rows_left} rows were not tried, because the calls of row "
                f"{last.number} failed after {last.seconds * len(last.verdicts):.0f} s"
            )
        return Finding("finite", "FAILED", detail)
    if unscored == len(verdicts):
        return Finding(
            "finite",
            "FAILED",
            f"None for each of {unscored} answers: nothing is scored. A judge that gives no grade "
            f"returns None{said}",
        )
    detail = f"{len(verdicts)} calls" + (f", {unscored} of them None{said}" if unscored else "")
    return Finding("finite", "ok", detail)


def _check_values(trials: Sequence[_Trial]) -> list[Finding]:
    """Return the findings about returned values, none of which is checked without a value."""
    if any(one.value is not None for trial in trials for one in trial.verdicts.values()):
        return [_check_deterministic(trials), *_check_gold(trials), _check_speed(trials)]
    names = ("deterministic", "gold highest", "empty low")
    findings = [Finding(name, "not checked", _NO_VALUE) for name in names]
    if all(one.error for trial in trials for one in trial.verdicts.values()):
        return [*findings, Finding("speed", "not checked", _NO_VALUE)]
    return [*findings, _check_speed(trials)]


def _check_deterministic(trials: Sequence[_Trial]) -> Finding:
    for trial in trials:
        for (kind, first), second in zip(trial.verdicts.items(), trial.repeated, strict=True):
            if first.value != second.value:
                detail = f"row {trial.number}, {kind}: {first.value}, then {second.value}"
                return Finding("deterministic", "warning", detail)
    return Finding("deterministic", "ok", "the second call returned the same values")


def _check_gold(trials: Sequence[_Trial]) -> list[Finding]:
    known = [trial for trial in trials if _RIGHT in trial.verdicts]
    if not known:
        looked_for = ", ".join(GOLD_COLUMNS)
        detail = (
            f"no right answers: name their column (--gold-column NAME); looked for {looked_for}"
        )
        return [Finding(name, "not checked", detail) for name in ("gold highest", "empty low")]
    scored = [trial for trial in known if not isnan(trial.value(_RIGHT))]
    if not scored:
        detail = "no right answer has a reward"
        return [Finding(name, "not checked", detail) for name in ("gold highest", "empty low")]
    return [_check_gold_highest(known), _check_empty_low(scored)]


def _check_gold_highest(trials: Sequence[_Trial]) -> Finding:
    higher = [
        [k for k in t.verdicts if k not in _SENTENCES and t.value(k) > t.value(_RIGHT)]
        for t in trials
    ]
    beaten = [(trial, kinds[0]) for trial, kinds in zip(trials, higher, strict=True) if kinds]
    if beaten:
        first, kind = beaten[0]
        detail = (
            f"{len(beaten)} of {len(trials)} rows: in row {first.number} {kind}, "
            f"{first.quote(kind)}, scores {first.value(kind):g}, and the right answer, "
            f"{first.quote(_RIGHT)}, {first.value(_RIGHT):g}"
        )
        return Finding("gold highest", "FAILED", detail)
    compared = [trial for trial in trials if _OTHER_ROW in trial.verdicts]
    if compared and all(trial.value(_OTHER_ROW) == trial.value(_RIGHT) for trial in compared):
        first = compared[0]
        detail = (
            "another row's answer always scores the same: right and wrong look alike. In row "
            f"{first.number}, {first.quote(_OTHER_ROW)} scores {first.value(_OTHER_ROW):g}, as "
            f"much as {first.quote(_RIGHT)}, which is right"
        )
        return Finding("gold highest", "warning", detail)
    copied = [(trial, kind) for trial in trials if (kind := _paid_copy(trial))]
    # By chance, the last choice that a prompt offers is right in some rows.
    if 2 * len(copied) > len(trials):
        first, kind = copied[0]
        detail = (
            f"in {len(copied)} of {len(trials)} rows a copy of the prompt scores as much as the "
            f"right answer. In row {first.number}, {first.quote(kind)} scores "
            f"{first.value(kind):g}, and {first.quote(_RIGHT)}, which is right, scores "
            f"{first.value(_RIGHT):g}. A model "
            "learns to copy: compare numbers with number_equal and texts with exact_match"
        )
        return Finding("gold highest", "warning", detail)
    scored = sum(trial.verdicts[_RIGHT].value is not None for trial in trials)
    detail = f"in {scored} of {len(trials)} rows"
    if scored == len(trials):
        return Finding("gold highest", "ok", detail)
    return Finding("gold highest", "warning", f"{detail}; the other right answers have no reward")


def _paid_copy(trial: _Trial) -> str | None:
    """Return the kind of answer that copies the prompt and earns as much as the right one."""
    right = trial.value(_RIGHT)
    if trial.value(_EMPTY) == right:
        return None
    if trial.value(_PROMPT_AS_ANSWER) >= right and not (
        trial.value(_OTHER_AS_ANSWER) >= trial.value(_PROMPT_AS_ANSWER)
    ):
        return _PROMPT_AS_ANSWER
    return _PROMPT if trial.value(_PROMPT) == right else None


def _asked_in(prompt: str) -> str:
    """Return the longest calculation in a prompt, or the whole prompt without one."""
    found = [match.group() for match in _CALCULATION.finditer(prompt[:_LONGEST_PROMPT])]
    return max(found, key=len, default=prompt)


def _with_sampled(finding: Finding, signal: SignalCheck) -> Finding:
    """Return the finding, which warns if sampled answers earn more than the right ones."""
    best = signal.highest
    if finding.name != "gold highest" or best is None:
        return finding
    detail = (
        f"{signal.above_right} of {signal.groups * signal.group_size} sampled answers score higher "
        f"than the right one: {_quote(best.answer)} scores {best.reward:g}, and the right answer, "
        f"{_quote(best.right_answer or '')}, {best.right_reward:g}. A model learns such answers"
    )
    return Finding("gold highest", "warning", detail)


def _check_empty_low(trials: Sequence[_Trial]) -> Finding:
    high = [trial for trial in trials if trial.value(_EMPTY) >= trial.value(_RIGHT)]
    if high:
        detail = (
            f"{len(high)} of {len(trials)} rows: in row {high[0].number} no answer at all scores "
            f"{high[0].value(_EMPTY):g}, as much as the right one"
        )
        return Finding("empty low", "FAILED", detail)
    if all(trial.verdicts[_EMPTY].error for trial in trials):
        return Finding("empty low", "not checked", "no empty answer has a reward")
    usual = Counter(trial.verdicts[_EMPTY].value for trial in trials).most_common(1)[0][0]
    return Finding("empty low", "ok", f"mostly {usual}")


def _check_speed(trials: Sequence[_Trial]) -> Finding:
    timed = [trial for trial in trials if not isnan(trial.seconds)]
    if not timed:
        return Finding("speed", "not checked", "not measured: all answers of the judge were cached")
    # The first call of a judge may have started processes.
    timed = timed[1:] if len(timed) > 1 and all(map(_was_cached, timed[0].repeated)) else timed
    slowest = max(timed, key=lambda trial: trial.seconds)
    usual = median(trial.seconds for trial in timed)
    detail = f"{_duration(usual)} a call, {_duration(slowest.seconds)} in row {slowest.number}"
    return Finding("speed", "warning" if slowest.seconds > _SLOW_SECONDS else "ok", detail)


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{float(f'{1e3 * seconds:.2g}'):g} ms"


class _Process:
    """What a reward may change in this process and a run does not restore."""

    def __init__(self) -> None:
        self.threads = {thread for thread in threading.enumerate() if not thread.daemon}
        self.variables = dict(os.environ)


def _check_process(scorer: Scorer, before: _Process) -> Finding:
    """Return which parts of its process the reward has changed."""
    now = _Process()
    changed = list(scorer.side_effects)
    changed += ["environment variables"] if now.variables != before.variables else []
    started = ", ".join(repr(thread.name) for thread in now.threads - before.threads)
    if started:
        changed.append(f"threads: it started {started}, which keep a finished run from ending")
    if changed:
        return Finding("process", "warning", f"the reward changes {'; '.join(changed)}")
    return Finding("process", "ok", "the reward changes nothing that other code relies on")


def _quote(text: str) -> str:
    return repr(text if len(text) <= _LONGEST_QUOTE else f"{text[:_LONGEST_QUOTE]} ...")


def _find_signal(signal: SignalCheck | None, rows: int, failed: Sequence[str]) -> Finding:
    if failed:
        return Finding("signal", "not checked", f"mend first: {', '.join(failed)}")
    if signal is None:
        return Finding("signal", "not checked", "no answers of a model were sampled")
    detail = (
        f"{signal.verdict}: rewards differ inside {signal.differing} of {signal.groups} groups of "
        f"{signal.group_size} completions; mean reward {signal.mean:.3g}"
    )
    if signal.groups < rows:
        detail += f"; {rows - signal.groups} rows were not sampled, because the time was over"
    return Finding("signal", "ok" if signal.verdict == "good" else "warning", detail)

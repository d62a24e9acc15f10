"""Alarms: signs that training collapses or overfits, bad gradients, and a machine that runs full.

Collapse is found by comparing metrics with the run's first steps.

The thresholds are coarse: metrics of a healthy run vary by some per cent, while a collapsing run
loses most of its reward or entropy within some tens of steps.
"""

from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from math import ceil, hypot, sqrt
from statistics import fmean, stdev

from textpolicy.tracking.alarm_advice import LearningSettings
from textpolicy.tracking.machine_signs import Sign
from textpolicy.types import Metrics

REWARD = "reward"
_REWARD_STD = "reward_std"
_ENTROPY = "entropy"
_ZERO_STD = "frac_reward_zero_std"
_LENGTH = "completions/mean_length"
_CLIPPED = "completions/clipped_ratio"
_NOT_FINITE = "update_skipped/not_finite"
_EVALUATED, _EVALUATION_ERROR = "eval/reward", "eval/standard_error"
ALARM_METRICS = (REWARD, _REWARD_STD, _ENTROPY, _ZERO_STD, _LENGTH, _CLIPPED)


@dataclass(frozen=True, kw_only=True)
class AlarmThresholds:
    """How far the mean of the last steps may be from the mean of the first steps."""

    first_steps: int = 3
    """Steps before learning shows. Few, because a run with a high rate is lost after ten steps."""
    window: int = 10
    """Steps in a rolling mean. With 16 groups of 8, the mean of a 0/1 reward is known to 0.02."""
    groups_per_step: int = 8
    """The groups for which these numbers of steps are enough. A run with fewer groups a step
    compares more steps, because the mean of few groups varies with their tasks."""
    entropy_factor: float = 2.0
    """Growth of entropy above which noise hides the reward. A healthy run's entropy falls."""
    entropy_left: float = 0.05
    """Share of the first entropy below which, with less reward, all answers are the same."""
    length_factor: float = 2.0
    """Change of length that is an alarm if reward fell too. With more reward, it is reasoning."""
    clipped_rise: float = 0.5
    """Rise of the share of completions that are cut off. The reward does not matter."""
    zero_std: float = 0.9
    """Share of groups without signal, if reward fell too. With more reward, the task is solved."""
    reward_fall: float = 0.5
    """Fall from the best rolling mean, in units of the standard deviation of rewards in a group,
    because rewards have no common scale."""
    noise_factor: float = 2.0
    """Standard deviations of reward between steps that a fall must exceed, because the mean reward
    also varies with the tasks of a step. The larger one of the best and the last steps counts: a
    reward that was rare and is gone has none in the last steps."""
    heldout_fall: float = 2.0
    """Standard errors that the held-out reward must fall from its best to be an alarm."""


@dataclass(frozen=True)
class Alarm:
    """One sign of collapse: the step that showed it, the numbers, and advice."""

    name: str
    step: int
    got: str
    expected: str
    advice: str

    @property
    def is_about_learning(self) -> bool:
        """Whether earlier adapters are better than those of this step."""
        return self.name in _CHECKS or self.name == "overfit"

    def __str__(self) -> str:
        return (
            f"alarm at step {self.step + 1}: {self.name}: {self.got}; expected {self.expected}. "
            f"{self.advice}"
        )


@dataclass(frozen=True, kw_only=True)
class _Level:
    """The rewards of several steps: mean, standard deviation between the steps, and range."""

    mean: float
    deviation: float
    least: float
    most: float

    @classmethod
    def of(cls, steps: Collection[Metrics]) -> "_Level":
        rewards = [step[REWARD] for step in steps]
        count = len(rewards)
        # The deviation between few steps is known badly, and is often larger.
        deviation = stdev(rewards) * count / (count - 1) if count > 1 else 0.0
        return cls(mean=fmean(rewards), deviation=deviation, least=min(rewards), most=max(rewards))


@dataclass(frozen=True, kw_only=True)
class _Trend:
    """Means over the first and the last steps, and the best mean, spread and noise of reward."""

    first: Metrics
    last: Metrics
    best: float
    spread: float
    noise: float
    settings: LearningSettings

    @property
    def reward_fell(self) -> bool:
        return self.last[REWARD] < self.first[REWARD] - self.noise


@dataclass(frozen=True, kw_only=True)
class _HeldOutTrend:
    """The last and the best held-out measurement, with the training reward at both."""

    best: float
    best_error: float
    best_training: float
    last: float = float("-inf")
    last_error: float = 0.0
    last_training: float = float("-inf")

    def sign(self, limits: AlarmThresholds) -> Sign | None:
        """Return the sign of a held-out reward that falls while the training reward rises."""
        least = self.best - limits.heldout_fall * hypot(self.best_error, self.last_error)
        if self.last >= least or self.last_training <= self.best_training:
            return None
        return (
            f"the held-out reward fell to {self.last:.3f} from {self.best:.3f} at its best, while "
            f"the training reward rose to {self.last_training:.3f} from {self.best_training:.3f}",
            f"at least {least:.3f}",
            "Read the samples: the policy may please the reward without solving the task, or know "
            "the training tasks by heart. Stop here and use the best adapter, or add tasks",
        )


class AlarmMonitor:
    """Checks the metrics of each step and reports each alarm once.

    Steps without reward are not compared with other steps. The `settings` of the run decide how
    many steps are compared, and what an alarm advises.
    """

    def __init__(
        self, limits: AlarmThresholds | None = None, settings: LearningSettings | None = None
    ) -> None:
        self.limits = limits or AlarmThresholds()
        self._settings = settings or LearningSettings()
        self._first: list[Metrics] = []
        each = self._settings.groups_per_step or self.limits.groups_per_step
        self._share = min(1.0, each / self.limits.groups_per_step)
        self._first_steps = ceil(self.limits.first_steps / self._share)
        self._last: deque[Metrics] = deque(maxlen=ceil(self.limits.window / self._share))
        self._best = _Level.of([{REWARD: 0.0}])
        self._spread = 0.0
        self._heldout: _HeldOutTrend | None = None
        self._reported: set[str] = set()
        self._signs: dict[str, Sign] = {}

    def check(
        self,
        step: int,
        metrics: Metrics,
        *,
        disk: Sign | None = None,
        memory: Sign | None = None,
    ) -> list[Alarm]:
        """Return the alarms that this step sets off for the first time.

        `disk` is what `low_disk` returned, and `memory` what `low_memory` returned.
        """
        now: dict[str, Sign | None] = {
            "not_finite": _check_not_finite(metrics),
            "disk": disk,
            "memory": memory,
        }
        if all(name in metrics for name in ALARM_METRICS):
            now |= self._check_trend(metrics)
        if _EVALUATED in metrics and self._last:
            self._add_measurement(metrics)
            now["overfit"] = self._heldout and self._heldout.sign(self.limits)
        self._signs = {name: sign for name, sign in self._signs.items() if name not in now}
        self._signs |= {name: sign for name, sign in now.items() if sign}
        new = [name for name in self._signs if name not in self._reported]
        self._reported.update(new)
        return [Alarm(name, step, *self._signs[name]) for name in new]

    def _add_measurement(self, metrics: Metrics) -> None:
        """Add a held-out measurement to the trend; a fall is measured from the best one so far."""
        value, error = metrics[_EVALUATED], metrics.get(_EVALUATION_ERROR, 0.0)
        training = _mean(self._last, REWARD)
        if self._heldout is None or value >= self._heldout.best:
            self._heldout = _HeldOutTrend(
                best=value, best_error=error, best_training=training, last=value, last_error=error
            )
        else:
            self._heldout = replace(
                self._heldout, last=value, last_error=error, last_training=training
            )

    def _check_trend(self, metrics: Metrics) -> dict[str, Sign | None]:
        """Return the signs of collapse, and None for each sign that is not there."""
        self._last.append(metrics)
        if len(self._first) < self._first_steps:
            self._first.append(metrics)
            self._best, self._spread = _Level.of(self._first), _mean(self._first, _REWARD_STD)
        if len(self._last) < (self._last.maxlen or 0):
            return {}
        last = _Level.of(self._last)
        self._best = max(self._best, last, key=lambda level: level.mean)
        self._spread = max(self._spread, _mean(self._last, _REWARD_STD))
        trend = _Trend(
            first={name: _mean(self._first, name) for name in ALARM_METRICS},
            last={name: _mean(self._last, name) for name in ALARM_METRICS},
            best=self._best.mean,
            spread=self._spread,
            noise=self._noise_between(self._best, last),
            settings=self._settings,
        )
        return {name: check(trend, self.limits) for name, check in _CHECKS.items()}

    def _noise_between(self, best: _Level, last: _Level) -> float:
        """Return the fall that chance may cause. A reward that fell at once varied by the fall."""
        if best.least > last.most:
            return 0.0
        # The mean of several small steps varies less than each of them.
        deviation = sqrt(self._share) * max(best.deviation, last.deviation)
        return self.limits.noise_factor * deviation

    def metrics(self) -> Metrics:
        """Return 1 for each alarm whose sign is present now, and 0 for the other alarms."""
        return {f"alarm/{name}": float(name in self._signs) for name in (*_CHECKS, *_OTHER_ALARMS)}


def _check_not_finite(metrics: Metrics) -> Sign | None:
    share = metrics.get(_NOT_FINITE, 0.0)
    if not share:
        return None
    return (
        f"{share:.0%} of the updates were skipped, because their gradient was NaN or infinite",
        "finite gradients",
        "Look at the batch in the folder rejected of the run. Lower the learning rate, or compute "
        "in float32 (--dtype float32)",
    )


def _check_entropy(trend: _Trend, limits: AlarmThresholds) -> Sign | None:
    first, last = trend.first[_ENTROPY], trend.last[_ENTROPY]
    got = f"{last:.3f} nats a token after {first:.3f} at the beginning"
    if last > (most := limits.entropy_factor * first):
        advice = f"{trend.settings.about_rate}. Remove any entropy bonus"
        return got, f"at most {most:.3f}", advice
    if last < (least := limits.entropy_left * first) and trend.reward_fell:
        advice = f"{trend.settings.about_rate}. {trend.settings.about_kl}"
        return got, f"at least {least:.3f}, because reward fell too", advice
    return None


def _check_length(trend: _Trend, limits: AlarmThresholds) -> Sign | None:
    first, last = trend.first, trend.last
    if last[_CLIPPED] > (most := first[_CLIPPED] + limits.clipped_rise):
        return (
            f"{last[_CLIPPED]:.0%} of completions are cut off, after {first[_CLIPPED]:.0%} at the "
            "beginning",
            f"at most {most:.0%}",
            "Check whether the reward grows with length. If not, raise --max-tokens. "
            f"{trend.settings.about_rate}",
        )
    least, most = first[_LENGTH] / limits.length_factor, first[_LENGTH] * limits.length_factor
    if trend.reward_fell and not least <= last[_LENGTH] <= most:
        return (
            f"{last[_LENGTH]:.1f} tokens a completion after {first[_LENGTH]:.1f} at the beginning",
            f"{least:.1f} to {most:.1f}, because reward fell too",
            f"{trend.settings.about_rate}. Read some completions",
        )
    return None


def _check_zero_std(trend: _Trend, limits: AlarmThresholds) -> Sign | None:
    first, last = trend.first, trend.last
    if last[_ZERO_STD] <= limits.zero_std or not trend.reward_fell:
        return None
    return (
        f"{last[_ZERO_STD]:.0%} of groups have equal rewards, after {first[_ZERO_STD]:.0%} at the "
        f"beginning, and reward fell from {first[REWARD]:.3f} to {last[REWARD]:.3f}",
        f"at most {limits.zero_std:.0%}",
        "Nothing is left to learn from. Start again from an earlier adapter. "
        f"{trend.settings.about_rate}",
    )


def _check_reward(trend: _Trend, limits: AlarmThresholds) -> Sign | None:
    least = trend.best - max(limits.reward_fall * trend.spread, trend.noise)
    if trend.last[REWARD] >= least:
        return None
    settings = trend.settings
    remedy = settings.about_groups if settings.has_low_rate else settings.about_kl
    return (
        f"the mean reward fell to {trend.last[REWARD]:.3f} from {trend.best:.3f} at its best",
        f"at least {least:.3f}",
        f"{settings.about_rate}. {remedy}. Check that each reward belongs to its completion",
    )


_CHECKS = {
    "entropy": _check_entropy,
    "length": _check_length,
    "zero_std": _check_zero_std,
    "reward": _check_reward,
}
_OTHER_ALARMS = ("overfit", "not_finite", "disk", "memory")


def _mean(steps: Iterable[Metrics], name: str) -> float:
    return fmean(step[name] for step in steps)

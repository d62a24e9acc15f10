"""Does a run go to ruin? Alarms on its metrics, measured against the run's own beginning.

Thresholds are coarse on purpose: a healthy run wanders by some per cent, a collapsing one loses
most of what it had within some tens of steps.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from statistics import fmean, pstdev

from textpolicy.types import Metrics

REWARD = "reward"
_REWARD_STD = "reward_std"
_ENTROPY = "entropy"
_ZERO_STD = "frac_reward_zero_std"
_LENGTH = "completions/mean_length"
_CLIPPED = "completions/clipped_ratio"
ALARM_METRICS = (REWARD, _REWARD_STD, _ENTROPY, _ZERO_STD, _LENGTH, _CLIPPED)


@dataclass(frozen=True, kw_only=True)
class AlarmThresholds:
    """How far a rolling mean may go from the run's beginning before it is called a collapse."""

    beginning: int = 3
    """Steps that show what the run was before it learned: few, a hot one is lost after ten."""
    window: int = 10
    """Steps in a rolling mean; with 16 x 8 rollouts the mean of a 0/1 reward is known to 0.02."""
    entropy_factor: float = 2.0
    """Entropy that has grown by so much: reward is drowned by noise. A healthy run's falls."""
    entropy_left: float = 0.05
    """Entropy of which no more is left, with less reward: one answer, a wrong one, for all."""
    length_factor: float = 2.0
    """Completions so much longer or shorter, with less reward. With more of it, it is a way
    to think."""
    clipped_rise: float = 0.5
    """Completions more than at the beginning that run to the limit, whatever they are rewarded."""
    zero_std: float = 0.9
    """Groups without signal, with less reward. With more of it, the task is solved."""
    reward_fall: float = 0.5
    """Fall from the best rolling mean, in units of the rewards' spread inside a group: rewards have
    no scale of their own."""
    wobble: float = 2.0
    """Standard deviations from step to step in the window that any fall of reward has to exceed:
    it also varies with the tasks that were drawn."""


@dataclass(frozen=True)
class Alarm:
    """One sign of collapse, the step that showed it, and what to do about it."""

    name: str
    step: int
    got: str
    expected: str
    advice: str

    def __str__(self) -> str:
        return (
            f"alarm at step {self.step + 1}: {self.name}: {self.got}; expected {self.expected}. "
            f"{self.advice}"
        )


_Deviation = tuple[str, str, str]
"""What was got and expected, and the advice."""


@dataclass(frozen=True, kw_only=True)
class _Trend:
    """Means over the beginning and over the last steps, and how reward went in between."""

    first: Metrics
    now: Metrics
    best: float
    spread: float
    wobble: float

    @property
    def worse(self) -> bool:
        return self.now[REWARD] < self.first[REWARD] - self.wobble


class AlarmMonitor:
    """Sees each step's metrics and says when something has gone wrong, once for each alarm.

    A step without scored rollouts counts for nothing.
    """

    def __init__(self, limits: AlarmThresholds | None = None) -> None:
        self.limits = limits or AlarmThresholds()
        self._first: list[Metrics] = []
        self._last: deque[Metrics] = deque(maxlen=self.limits.window)
        self._best = self._spread = 0.0
        self._fired: set[str] = set()
        self._present: dict[str, _Deviation] = {}

    def check(self, step: int, metrics: Metrics) -> list[Alarm]:
        """The alarms that this step sets off for the first time."""
        if not all(column in metrics for column in ALARM_METRICS):
            return []
        self._last.append(metrics)
        if len(self._first) < self.limits.beginning:
            self._first.append(metrics)
            self._best, self._spread = _mean(self._first, REWARD), _mean(self._first, _REWARD_STD)
        if len(self._last) < self.limits.window:
            return []
        self._best = max(self._best, _mean(self._last, REWARD))
        self._spread = max(self._spread, _mean(self._last, _REWARD_STD))
        self._present = dict(self._signs())
        new = [name for name in self._present if name not in self._fired]
        self._fired.update(new)
        return [Alarm(name, step, *self._present[name]) for name in new]

    def metrics(self) -> Metrics:
        """1 for each alarm whose sign is there now, 0 for the others."""
        return {f"alarm/{name}": float(name in self._present) for name in _SIGNS}

    def _signs(self) -> Iterator[tuple[str, _Deviation]]:
        trend = _Trend(
            first={column: _mean(self._first, column) for column in ALARM_METRICS},
            now={column: _mean(self._last, column) for column in ALARM_METRICS},
            best=self._best,
            spread=self._spread,
            wobble=self.limits.wobble * pstdev(metrics[REWARD] for metrics in self._last),
        )
        for name, sign_of in _SIGNS.items():
            if sign := sign_of(trend, self.limits):
                yield name, sign


def _entropy(trend: _Trend, limits: AlarmThresholds) -> _Deviation | None:
    first, now = trend.first, trend.now
    got = f"{now[_ENTROPY]:.3f} nats a token after {first[_ENTROPY]:.3f} at the beginning"
    if now[_ENTROPY] > (most := limits.entropy_factor * first[_ENTROPY]):
        advice = "Lower the learning rate, and take off any entropy bonus"
        return got, f"at most {most:.3f}", advice
    if now[_ENTROPY] < (least := limits.entropy_left * first[_ENTROPY]) and trend.worse:
        advice = "Lower the learning rate, or add a KL divergence (--beta)"
        return got, f"at least {least:.3f}, as reward fell too", advice
    return None


def _length(trend: _Trend, limits: AlarmThresholds) -> _Deviation | None:
    first, now = trend.first, trend.now
    if now[_CLIPPED] > (most := first[_CLIPPED] + limits.clipped_rise):
        return (
            f"{now[_CLIPPED]:.0%} of completions run to the limit after {first[_CLIPPED]:.0%} "
            "at the beginning",
            f"at most {most:.0%}",
            "Does the reward grow with length? Otherwise lower the learning rate, or raise "
            "max_tokens",
        )
    least, most = first[_LENGTH] / limits.length_factor, first[_LENGTH] * limits.length_factor
    if trend.worse and not least <= now[_LENGTH] <= most:
        return (
            f"{now[_LENGTH]:.1f} tokens a completion after {first[_LENGTH]:.1f} at the beginning",
            f"{least:.1f} to {most:.1f}, as reward fell too",
            "Lower the learning rate, and read some completions",
        )
    return None


def _zero_std(trend: _Trend, limits: AlarmThresholds) -> _Deviation | None:
    first, now = trend.first, trend.now
    if now[_ZERO_STD] > limits.zero_std and trend.worse:
        return (
            f"{now[_ZERO_STD]:.0%} of groups have equal rewards, after {first[_ZERO_STD]:.0%} "
            f"at the beginning, and reward fell from {first[REWARD]:.3f} to {now[REWARD]:.3f}",
            f"at most {limits.zero_std:.0%}",
            "Nothing is left to learn from: go back to an earlier adapter with a lower learning "
            "rate",
        )
    return None


def _reward(trend: _Trend, limits: AlarmThresholds) -> _Deviation | None:
    reward, best = trend.now[REWARD], trend.best
    least = best - max(limits.reward_fall * trend.spread, trend.wobble)
    if reward < least:
        return (
            f"the mean reward fell to {reward:.3f} from {best:.3f} at its best",
            f"at least {least:.3f}",
            "Lower the learning rate, or add a KL divergence (--beta); if it is low already, see "
            "that each reward belongs to its completion",
        )
    return None


_SIGNS = {"entropy": _entropy, "length": _length, "zero_std": _zero_std, "reward": _reward}


def _mean(steps: Iterable[Metrics], column: str) -> float:
    return fmean(step[column] for step in steps)

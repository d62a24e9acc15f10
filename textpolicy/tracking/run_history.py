"""RunHistory: the metrics of a run so far and the time left. Formats both for the console."""

import itertools
import math
from collections import deque
from collections.abc import Sequence
from statistics import fmean

from textpolicy.types import Metrics

BLOCKS = "▁▂▃▄▅▆▇█"
_RECENT_STEPS = 10
_MEASUREMENT = "time/evaluate"
_TIMES = ("wait", "generate", "reward", "train", "reload", "checkpoint")


class RunHistory:
    """Collects the metrics of finished steps, and estimates the seconds that are left.

    `measured_every` is the number of steps between two measurements on held-out tasks, if there are
    measurements between the first and the last one.
    """

    def __init__(self, steps: int, *, measured_every: int | None = None) -> None:
        self.steps = steps
        self._every = measured_every
        self.steps_done = 0
        self.seconds_left = 0.0
        self.metrics: Metrics = {}
        self._values: dict[str, list[float]] = {}
        # The last steps tell what is to come: a run may become slower, or faster, as it learns.
        self._step_seconds: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._last_end: float | None = None

    def add(self, step: int, metrics: Metrics, now: float) -> None:
        """Add the finished step `step`, which is counted from 0. `now` is a clock in seconds."""
        for name, value in metrics.items():
            self._values.setdefault(name, []).append(value)
        if self._last_end is None:
            # The time of the first step counts, the time to load the model before it does not.
            self._step_seconds.append(metrics.get("time/step", 0))
        else:
            # A measurement comes between two steps, and the second one reports its time.
            took = now - self._last_end - metrics.get(_MEASUREMENT, 0)
            self._step_seconds.append(max(0.0, took))
        self._last_end = now
        self.metrics, self.steps_done = metrics, step + 1
        self.seconds_left = fmean(self._step_seconds) * (self.steps - self.steps_done)
        if self.values(_MEASUREMENT):
            self.seconds_left += self.last(_MEASUREMENT) * self._measurements_left()

    def _measurements_left(self) -> int:
        """Return how many measurements follow: the last one, and those before the last step."""
        if self._every is None:
            return 1
        return 1 + (self.steps - 1) // self._every - (self.steps_done - 1) // self._every

    def values(self, name: str) -> Sequence[float]:
        """Return the values of a metric at the steps that reported the metric."""
        return self._values.get(name, ())

    def last(self, name: str) -> float:
        """Return the last reported value of a metric, or NaN."""
        values = self.values(name)
        return values[-1] if values else float("nan")


def time_shares(metrics: Metrics) -> dict[str, float]:
    """Return the parts of the step's time that take at least a hundredth of it."""
    total = metrics.get("time/step", 0) or 1.0
    shares = {name: metrics.get(f"time/{name}", 0) / total for name in _TIMES}
    return {name: share for name, share in shares.items() if share >= 0.01}


def present_alarms(metrics: Metrics) -> list[str]:
    """Return the names of the alarms whose signs are present in these metrics."""
    prefix = "alarm/"
    return [
        name.removeprefix(prefix)
        for name, value in metrics.items()
        if name.startswith(prefix) and value > 0
    ]


def spark_line(values: Sequence[float], width: int) -> str:
    """Return `values` as a line of at most `width` block characters, from lowest to highest.

    Each character shows the mean of several consecutive values, without NaN and infinity.
    """
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return ""
    count = min(width, len(values))
    edges = [i * len(values) // count for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, span = min(means), max(means) - min(means) or 1.0
    return "".join(BLOCKS[round((mean - low) / span * (len(BLOCKS) - 1))] for mean in means)


def format_duration(seconds: float) -> str:
    """Return seconds as M:SS, or as H:MM:SS from one hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

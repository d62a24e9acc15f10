"""How a run has gone so far, for whoever shows it: numbers, the way there, and the time left."""

import itertools
from collections.abc import Sequence

from textpolicy.types import Metrics

BLOCKS = "▁▂▃▄▅▆▇█"
_TIMES = ("generate", "reward", "train", "reload", "checkpoint")


class RunHistory:
    """Takes in finished steps. The clock is in seconds, and need not begin at 0."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.done = 0
        self.remaining = 0.0
        self.metrics: Metrics = {}
        self._history: dict[str, list[float]] = {}
        self._started: float | None = None
        self._seen = 0

    def add(self, step: int, metrics: Metrics, now: float) -> None:
        """Take in the finished step `step`, counted from 0."""
        for name, value in metrics.items():
            self._history.setdefault(name, []).append(value)
        if self._started is None:
            # The first step began before its report; loading the model came before both.
            self._started = now - metrics.get("time/step", 0)
        self._seen += 1
        self.metrics, self.done = metrics, step + 1
        self.remaining = (now - self._started) / self._seen * (self.steps - self.done)

    def values(self, name: str) -> Sequence[float]:
        """A metric at the steps that had it."""
        return self._history.get(name, ())

    def last(self, name: str) -> float:
        """A metric where it was last reported, NaN if never."""
        values = self.values(name)
        return values[-1] if values else float("nan")


def time_shares(metrics: Metrics) -> dict[str, float]:
    """The parts of the step's time that are at least a hundredth of it."""
    total = metrics.get("time/step", 0) or 1.0
    shares = {name: metrics.get(f"time/{name}", 0) / total for name in _TIMES}
    return {name: share for name, share in shares.items() if share >= 0.01}


def spark_line(values: Sequence[float], width: int) -> str:
    """The history of `values` between their lowest and highest, in at most `width` characters.

    Each character is the mean of its stretch.
    """
    if not values:
        return ""
    stretches = min(width, len(values))
    edges = [i * len(values) // stretches for i in range(stretches + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, span = min(means), max(means) - min(means) or 1.0
    return "".join(BLOCKS[round((mean - low) / span * (len(BLOCKS) - 1))] for mean in means)


def format_duration(seconds: float) -> str:
    """Hours, minutes and seconds as a clock shows them."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

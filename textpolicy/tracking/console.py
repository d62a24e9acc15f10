"""Live progress of a run: a line redrawn in place on a terminal, plain lines everywhere else."""

import itertools
import os
import shutil
import time
import unicodedata
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from textpolicy.types import Metrics

_BLOCKS = "▁▂▃▄▅▆▇█"
_SPARK_WIDTH = 16
_SECONDS_BETWEEN_LINES = 2.0
# Control, format (bidirectional overrides among them), surrogate and private-use characters.
_UNSAFE = {"Cc", "Cf", "Cs", "Co", "Cn"}


@runtime_checkable
class Stream(Protocol):
    """Where progress goes: any text file."""

    def write(self, text: str, /) -> int: ...
    def flush(self) -> None: ...
    def isatty(self) -> bool: ...


class Console:
    """Shows each step of a run on `stream`; `close` ends the redrawn line."""

    def __init__(
        self, stream: Stream, steps: int, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = stream
        self._steps = steps
        self._clock = clock
        self._started: float | None = None
        self._written = clock()
        self._rewards: list[float] = []
        self._live = stream.isatty() and os.environ.get("TERM") != "dumb"
        self._colour = self._live and not os.environ.get("NO_COLOR")
        self._width = 0

    def show(self, step: int, metrics: Metrics) -> None:
        """Report the finished step `step`, counted from 0."""
        if "reward" in metrics:
            self._rewards.append(metrics["reward"])
        now, done = self._clock(), step + 1
        if self._started is None:
            # The first step began before its report; loading the model came before both.
            self._started = now - metrics.get("time/step", 0)
        text = self._line(done, metrics, (now - self._started) / done * (self._steps - done))
        if self._live:
            self._redraw(text)
        elif done in (1, self._steps) or now - self._written >= _SECONDS_BETWEEN_LINES:
            self._written = now
            self.note(text)

    def note(self, text: str) -> None:
        """Write a line that stays, in place of the live one."""
        if self._width:
            self._redraw("")
            self._stream.write("\r")
        self._stream.write(text + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Leave the live line as it is and begin a new one."""
        if self._width:
            self._width = 0
            self.note("")

    def _line(self, done: int, metrics: Metrics, remaining: float) -> str:
        spark = spark_line(self._rewards, _SPARK_WIDTH) if self._live else ""
        fields = [
            f"step {done:>{len(str(self._steps))}}/{self._steps}",
            f"reward {spark}{' ' if spark else ''}{metrics.get('reward', float('nan')):.3f}",
            f"length {metrics.get('completions/mean_length', 0):.1f}",
            f"{metrics.get('tokens_per_second', 0):,.0f} tokens/s",
            f"{metrics.get('time/step', 0):.2f} s/step",
            f"{_clock_face(remaining)} left",
        ]
        return "  ".join(fields)

    def _redraw(self, text: str) -> None:
        text = text[: shutil.get_terminal_size().columns - 1]
        shown = f"\x1b[36m{text}\x1b[0m" if self._colour else text
        # Spaces wipe what a longer line left behind, without any escape sequence.
        self._stream.write(f"\r{shown}{' ' * (self._width - len(text))}")
        self._stream.flush()
        self._width = len(text)


def spark_line(values: Sequence[float], width: int) -> str:
    """The course of `values` between their lowest and highest, in at most `width` characters.

    Each character is the mean of its stretch.
    """
    if not values:
        return ""
    stretches = min(width, len(values))
    edges = [i * len(values) // stretches for i in range(stretches + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, span = min(means), max(means) - min(means) or 1.0
    return "".join(_BLOCKS[round((mean - low) / span * (len(_BLOCKS) - 1))] for mean in means)


def visible(text: str) -> str:
    """Text that is safe on a terminal: what could move the cursor or hide is spelled as \\x1b.

    Line breaks and tabs stay.
    """
    return "".join(
        char
        if char in "\n\t" or unicodedata.category(char) not in _UNSAFE
        else char.encode("unicode_escape").decode()
        for char in text
    )


def _clock_face(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

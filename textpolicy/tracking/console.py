"""Live progress of a run: a panel redrawn in place on a terminal, a line a step elsewhere."""

import os
import time
import unicodedata
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol, runtime_checkable

from textpolicy.tracking.run_history import RunHistory, format_duration, time_shares
from textpolicy.tracking.sink import SampleRow
from textpolicy.types import Metrics

_SECONDS_BETWEEN_SAMPLES = 10.0
_LONGEST = 60
# Control, format (bidirectional overrides among them), surrogate and private-use characters.
_UNSAFE = {"Cc", "Cf", "Cs", "Co", "Cn"}


@runtime_checkable
class TextStream(Protocol):
    """Where progress goes: any text file."""

    def write(self, text: str, /) -> int: ...
    def flush(self) -> None: ...
    def isatty(self) -> bool: ...


@runtime_checkable
class ProgressView(Protocol):
    """A way to show a history."""

    def show(self, history: RunHistory, sample: str | None) -> None:
        """Show the last step of it, and a sample if there is a new one."""
        ...

    def note(self, text: str) -> None:
        """Write a line that stays."""
        ...

    def close(self) -> None:
        """Nothing follows for now."""
        ...


class Console:
    """Shows each step of a run on `stream`, and a sample every ten seconds; `close` ends the view.

    Text of models is made safe to show; the caller of `note` sees to that of its own.
    """

    def __init__(
        self, stream: TextStream, steps: int, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._history = RunHistory(steps)
        self._clock = clock
        self._sampled: float | None = None
        self._view = _view_on(stream)

    def show(self, step: int, metrics: Metrics, samples: Sequence[SampleRow] = ()) -> None:
        """Report the finished step `step`, counted from 0."""
        now = self._clock()
        self._history.add(step, metrics, now)
        sample = None
        if samples and (self._sampled is None or now - self._sampled >= _SECONDS_BETWEEN_SAMPLES):
            self._sampled = now
            sample = sample_line(samples[step % len(samples)])
        self._view.show(self._history, sample)

    def note(self, text: str) -> None:
        """Write a line that stays, above what is redrawn."""
        self._view.note(text)

    def close(self) -> None:
        """Leave what is shown as it is; what is written next begins a new line."""
        self._view.close()


class LineView:
    """A line a step, for files, pipes and terminals that cannot redraw."""

    def __init__(self, stream: TextStream) -> None:
        self._stream = stream

    def show(self, history: RunHistory, sample: str | None) -> None:
        """Write the step's line, and the sample's."""
        self.note(_line(history))
        if sample:
            self.note(f"sample  {sample}")

    def note(self, text: str) -> None:
        """Write a line."""
        # A reader that is gone, as `head` is after its lines, ends no run that goes on overnight.
        with suppress(BrokenPipeError):
            self._stream.write(text + "\n")
            self._stream.flush()

    def close(self) -> None:
        """Every line has ended."""


def _view_on(stream: TextStream) -> ProgressView:
    if not stream.isatty() or os.environ.get("TERM") == "dumb":
        return LineView(stream)
    # Only terminals need rich, and its import takes a tenth of a second.
    from textpolicy.tracking.live_view import LiveView

    return LiveView(stream)


def _line(history: RunHistory) -> str:
    metrics = history.metrics
    shares = time_shares(metrics).items()
    fields = [
        f"step {history.done:>{len(str(history.steps))}}/{history.steps}",
        f"reward {metrics.get('reward', float('nan')):.3f}",
        f"length {metrics.get('completions/mean_length', 0):.1f}",
        f"{metrics.get('tokens_per_second', 0):,.0f} tokens/s",
        f"{metrics.get('time/step', 0):.2f} s/step",
        *([", ".join(f"{name} {share:.0%}" for name, share in shares)] if shares else []),
        f"{format_duration(history.remaining)} left",
    ]
    return "  ".join(fields)


def sample_line(sample: SampleRow) -> str:
    """A sample on one safe line; the end of what is longer is left out."""
    prompt, reward = sample["prompt"], sample["reward"]
    asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    worth = "no reward" if reward is None else f"reward {reward:.3g}"
    return f"{_short(asked)} → {_short(sample['completion'])}  ({worth})"


def _short(text: str) -> str:
    line = terminal_safe(text).replace("\n", "⏎").replace("\t", " ")
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 1]}…"


def terminal_safe(text: str) -> str:
    """Text that is safe on a terminal: what could move the cursor or hide is spelled as \\x1b.

    Line breaks and tabs stay.
    """
    return "".join(
        char
        if char in "\n\t" or unicodedata.category(char) not in _UNSAFE
        else char.encode("unicode_escape").decode()
        for char in text
    )

"""Console: progress of a run, as a panel on a terminal and as lines of steps elsewhere."""

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from math import ceil
from typing import Protocol, runtime_checkable

from textpolicy.tracking.named_numbers import describe_numbers
from textpolicy.tracking.run_history import (
    RunHistory,
    format_duration,
    present_alarms,
    time_shares,
)
from textpolicy.tracking.samples import sample_line
from textpolicy.tracking.sink import SampleRow
from textpolicy.types import Metrics
from textpolicy.untrusted.terminal import TextStream, terminal_safe

_SECONDS_BETWEEN_SAMPLES = 10.0
_SAMPLE_WIDTH = 140
# Of lines for a file or a pipe.
_LINES = 40
_SECONDS_WITHOUT_A_LINE = 30.0


@runtime_checkable
class ProgressView(Protocol):
    """Shows the last step and a new sample, and writes notes that stay, until `close`."""

    def show(self, history: RunHistory, sample: SampleRow | None) -> None: ...
    def note(self, text: str) -> None: ...
    def close(self) -> None: ...


class Console:
    """Shows each step of a run on `stream`, and one sample every ten seconds.

    Characters that could control the terminal are spelled out, in samples and in notes.
    """

    def __init__(
        self,
        stream: TextStream,
        steps: int,
        *,
        measured_every: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._history = RunHistory(steps, measured_every=measured_every)
        self._clock = clock
        self._last_sample = float("-inf")
        self._view: ProgressView = LineView(stream, clock=clock)
        if stream.isatty() and os.environ.get("TERM") != "dumb":
            # Only terminals need rich, whose import takes a tenth of a second.
            from textpolicy.tracking.live_view import LiveView

            self._view = LiveView(stream)

    def show(self, step: int, metrics: Metrics, samples: Sequence[SampleRow] = ()) -> None:
        """Show the finished step `step`, which is counted from 0."""
        now = self._clock()
        self._history.add(step, metrics, now)
        sample = None
        if samples and now - self._last_sample >= _SECONDS_BETWEEN_SAMPLES:
            self._last_sample = now
            sample = samples[step % len(samples)]
        self._view.show(self._history, sample)

    def note(self, text: str) -> None:
        """Write a line that stays, above the panel if there is one."""
        self._view.note(terminal_safe(text))

    def close(self) -> None:
        """Leave the last view on the screen. Later output begins on a new line."""
        self._view.close()


class LineView:
    """Writes lines of steps, to files, pipes and terminals that cannot redraw.

    A run of up to `_LINES` steps gets a line for each step. A longer run gets about `_LINES` lines,
    and more only if a step takes long.
    """

    def __init__(self, stream: TextStream, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._last_line = self._last_sample = float("-inf")

    def show(self, history: RunHistory, sample: SampleRow | None) -> None:
        """Write the line of the step, and the line of the sample."""
        now, every = self._clock(), ceil(history.steps / _LINES)
        in_turn = history.steps_done % every == 0 or self._last_line == float("-inf")
        if not in_turn and now - self._last_line < _SECONDS_WITHOUT_A_LINE:
            return
        self._last_line = now
        self.note(_step_line(history))
        if sample and (every == 1 or now - self._last_sample >= _SECONDS_WITHOUT_A_LINE):
            self._last_sample = now
            self.note(f"sample  {sample_line(sample, _SAMPLE_WIDTH)}")

    def note(self, text: str) -> None:
        """Write a line."""
        # A closed pipe, as `head` leaves after its lines, must not end a long run. Neither must a
        # file that the user's code has closed.
        with suppress(BrokenPipeError, ValueError):
            self._stream.write(text + "\n")
            self._stream.flush()

    def close(self) -> None:
        """Do nothing, because every line has ended."""


def _sampling_fields(metrics: Metrics) -> list[str]:
    if "num_tokens" not in metrics and "trainer/idle" in metrics:
        return ["no new groups"]
    return [
        f"reward {metrics.get('reward', float('nan')):.3f}",
        f"length {metrics.get('completions/mean_length', 0):.1f}",
        *describe_numbers(metrics),
        f"{metrics.get('tokens_per_second', 0):,.0f} tokens/s",
    ]


def _step_line(history: RunHistory) -> str:
    metrics = history.metrics
    shares = time_shares(metrics).items()
    fields = [
        f"step {history.steps_done:>{len(str(history.steps))}}/{history.steps}",
        *_sampling_fields(metrics),
        # The trainer skips an update whose gradient is exactly 0, so no adapter follows.
        *(["no update: no signal"] if metrics.get("update_skipped/no_signal") == 1 else []),
        f"{metrics.get('time/step', 0):.2f} s/step",
        *([", ".join(f"{name} {share:.0%}" for name, share in shares)] if shares else []),
        f"{format_duration(history.seconds_left)} left",
        *(f"alarm: {name}" for name in present_alarms(metrics)),
    ]
    return "  ".join(fields)

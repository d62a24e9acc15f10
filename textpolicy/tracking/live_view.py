"""LiveView: a panel on the terminal that rich redraws in place during a run."""

import time
from collections.abc import Mapping
from typing import IO, cast

from rich.console import Console, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from textpolicy.tracking.named_numbers import describe_numbers
from textpolicy.tracking.run_history import (
    BLOCKS,
    RunHistory,
    format_duration,
    present_alarms,
    spark_line,
    time_shares,
)
from textpolicy.tracking.samples import sample_line
from textpolicy.tracking.sink import SampleRow

_LABEL_WIDTH = 7
_BORDERS = 6  # of the panel, and between the columns
_SPARK_WIDTHS = (4, 24)
_BAR_WIDTHS = (10, 40)
_SECONDS_BETWEEN_FRAMES = 0.2
_COLOURS = ("cyan", "yellow", "magenta", "green", "blue")


class LiveView:
    """Draws the panel on `stream`, which must be a terminal, at most five times a second."""

    def __init__(self, stream: object) -> None:
        # Standard output is left alone: reward functions may print there.
        self._live = Live(
            console=Console(file=cast(IO[str], stream), highlight=False),
            auto_refresh=False,
            redirect_stdout=False,
        )
        self._history: RunHistory | None = None
        self._sample: SampleRow | None = None
        self._last_frame = float("-inf")

    def show(self, history: RunHistory, sample: SampleRow | None) -> None:
        """Draw the history so far, with the sample or else the last sample."""
        if self._history is None:
            self._live.start()
        self._history, self._sample = history, sample or self._sample
        now = time.monotonic()
        if now - self._last_frame >= _SECONDS_BETWEEN_FRAMES:
            self._last_frame = now
            self._live.update(self._panel(history), refresh=True)

    def note(self, text: str) -> None:
        """Write a line that stays above the panel."""
        self._live.console.print(Text(text))

    def close(self) -> None:
        """Draw the panel for the last time and show the cursor again."""
        if self._history:
            self._live.update(self._panel(self._history))
            self._live.stop()
            self._history = None

    def _panel(self, history: RunHistory) -> RenderableType:
        return panel(history, self._sample, self._live.console.width)


def panel(history: RunHistory, sample: SampleRow | None, width: int) -> RenderableType:
    """Return the panel: the numbers of the last step, and spark lines of the steps before it.

    On a terminal of few columns, spark lines and bars give way. Labels and numbers stay whole.
    """
    metrics, room = history.metrics, max(1, width - _LABEL_WIDTH - _BORDERS)
    rows = Table.grid(padding=(0, 2, 0, 0), expand=True)
    rows.add_column(style="dim", no_wrap=True, width=_LABEL_WIDTH)
    rows.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    spread = f"± {metrics.get('reward_std', 0):.2f}"
    rows.add_row("reward", _spark(history, "reward", spread, room))
    if scores := describe_numbers(metrics):
        rows.add_row("scores", Text("   ".join(scores)))
    if history.values("eval/reward"):
        error = history.last("eval/standard_error")
        rows.add_row("eval", _spark(history, "eval/reward", f"± {error:.2f}", room))
    cut = f"{metrics.get('completions/clipped_ratio', 0):.0%} cut off"
    rows.add_row("length", _spark(history, "completions/mean_length", cut, room))
    rows.add_row("entropy", _spark(history, "entropy", "", room))
    names = ("mixed", "all_good", "all_bad")
    groups = [f"{metrics.get(f'frac_{name}', 0):.0%} {name.replace('_', ' ')}" for name in names]
    rows.add_row("groups", "   ".join(groups))
    speed = f"tokens/s   {metrics.get('time/step', 0):.2f} s a step"
    rows.add_row("speed", _spark(history, "tokens_per_second", speed, room))
    rows.add_row("time", _time_bar(time_shares(metrics), room))
    if alarms := present_alarms(metrics):
        rows.add_row(Text("alarm", style="red"), Text(", ".join(alarms), style="red"))
    if sample:
        rows.add_row("sample", Text(sample_line(sample, room), style="italic"))
    title = f"step {history.steps_done}/{history.steps}"
    # The bar has no line end of its own, so it gets a row of its own.
    whole = Table.grid(expand=True)
    whole.add_row(ProgressBar(total=history.steps, completed=history.steps_done))
    whole.add_row(rows)
    left = f"{format_duration(history.seconds_left)} left"
    return Panel(whole, title=title, subtitle=left, title_align="left")


def _spark(history: RunHistory, name: str, note: str, room: int) -> Text:
    last = history.last(name)
    value = f"{last:,.0f}" if abs(last) >= 1000 else f"{last:.3f}"
    numbers = f"  {value:>8}  "
    width = _within(_SPARK_WIDTHS, room - len(numbers) - len(note))
    line = spark_line(history.values(name), width)
    return Text.assemble((f"{line:<{width}}", "cyan"), numbers, (note, "dim"))


def _time_bar(shares: Mapping[str, float], room: int) -> Text:
    """Return a bar and its legend, on two lines or more if one is too short for both."""
    coloured = list(zip(shares.items(), _COLOURS, strict=False))
    legend = [(f"{name} {share:.0%}", colour) for (name, share), colour in coloured]
    words = sum(len(text) + 2 for text, _ in legend)
    one_line = words + _BAR_WIDTHS[0] + 2 <= room
    width = _within(_BAR_WIDTHS, room - words - 2) if one_line else min(room, _BAR_WIDTHS[1])
    bar = [(BLOCKS[-1] * round(share * width), colour) for (_, share), colour in coloured]
    text, used = Text.assemble(*bar, "  " if one_line else "\n"), 0
    for word, colour in legend:
        wraps = not one_line and used + 2 + len(word) > room
        text.append("\n" if wraps else "  " if used else "")
        text.append(word, colour)
        used = len(word) + (0 if wraps else used + 2)
    return text


def _within(limits: tuple[int, int], wanted: int) -> int:
    least, most = limits
    return max(least, min(most, wanted))

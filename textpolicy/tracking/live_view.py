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

from textpolicy.tracking.run_history import (
    BLOCKS,
    RunHistory,
    format_duration,
    spark_line,
    time_shares,
)

_SPARK_WIDTH = 24
_BAR_WIDTH = 40
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
        self._sample: str | None = None
        self._last_frame = float("-inf")

    def show(self, history: RunHistory, sample: str | None) -> None:
        """Draw the history so far, with the sample or else the last sample."""
        if self._history is None:
            self._live.start()
        self._history, self._sample = history, sample or self._sample
        now = time.monotonic()
        if now - self._last_frame >= _SECONDS_BETWEEN_FRAMES:
            self._last_frame = now
            self._live.update(panel(history, self._sample), refresh=True)

    def note(self, text: str) -> None:
        """Write a line that stays above the panel."""
        self._live.console.print(Text(text))

    def close(self) -> None:
        """Draw the panel for the last time and show the cursor again."""
        if self._history:
            self._live.update(panel(self._history, self._sample))
            self._live.stop()
            self._history = None


def panel(history: RunHistory, sample: str | None) -> RenderableType:
    """Return the panel: the numbers of the last step, and spark lines of the steps before it."""
    metrics = history.metrics
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="dim", no_wrap=True)
    rows.add_column(no_wrap=True, overflow="ellipsis")
    rows.add_row("reward", _spark(history, "reward", f"± {metrics.get('reward_std', 0):.2f}"))
    if history.values("eval/reward"):
        error = history.last("eval/standard_error")
        rows.add_row("eval", _spark(history, "eval/reward", f"± {error:.2f}"))
    cut = f"{metrics.get('completions/clipped_ratio', 0):.0%} cut off"
    rows.add_row("length", _spark(history, "completions/mean_length", cut))
    rows.add_row("entropy", _spark(history, "entropy", ""))
    names = ("mixed", "all_good", "all_bad")
    groups = [f"{metrics.get(f'frac_{name}', 0):.0%} {name.replace('_', ' ')}" for name in names]
    rows.add_row("groups", "   ".join(groups))
    speed = f"tokens/s   {metrics.get('time/step', 0):.2f} s a step"
    rows.add_row("speed", _spark(history, "tokens_per_second", speed))
    rows.add_row("time", _time_bar(time_shares(metrics)))
    if sample:
        rows.add_row("sample", Text(sample, style="italic"))
    title = f"step {history.steps_done}/{history.steps}"
    # The bar has no line end of its own, so it gets a row of its own.
    whole = Table.grid(expand=True)
    whole.add_row(ProgressBar(total=history.steps, completed=history.steps_done))
    whole.add_row(rows)
    left = f"{format_duration(history.seconds_left)} left"
    return Panel(whole, title=title, subtitle=left, title_align="left")


def _spark(history: RunHistory, name: str, note: str) -> Text:
    line = spark_line(history.values(name), _SPARK_WIDTH)
    last = history.last(name)
    value = f"{last:,.0f}" if abs(last) >= 1000 else f"{last:.3f}"
    return Text.assemble((f"{line:<{_SPARK_WIDTH}}", "cyan"), f"  {value:>8}  ", (note, "dim"))


def _time_bar(shares: Mapping[str, float]) -> Text:
    coloured = list(zip(shares.items(), _COLOURS, strict=False))
    bar = [(BLOCKS[-1] * round(share * _BAR_WIDTH), colour) for (_, share), colour in coloured]
    legend = [(f"{name} {share:.0%}  ", colour) for (name, share), colour in coloured]
    return Text.assemble(*bar, "  ", *legend)

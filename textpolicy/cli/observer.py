"""What watches a training run from the command line: files, console, alarms, the best adapter."""

from collections.abc import Sequence

from textpolicy.loop import StepReport
from textpolicy.tracking.alarms import Alarm, Watch
from textpolicy.tracking.best import BestAdapter
from textpolicy.tracking.console import Console
from textpolicy.tracking.sink import Sink
from textpolicy.types import Progress


class Observer:
    """Takes each step's report, and stops the run at the first alarm if that was asked for."""

    def __init__(
        self, sinks: Sequence[Sink], console: Console, best: BestAdapter, *, stop_on_alarm: bool
    ) -> None:
        self._sinks = sinks
        self._console = console
        self._best = best
        self._stop_on_alarm = stop_on_alarm
        self._watch = Watch()
        self.alarms: list[Alarm] = []
        self.steps = 0
        self.stopped = False

    def see(self, report: StepReport) -> Progress:
        self.steps = report.step + 1
        new = self._watch.see(report.step, report.metrics)
        self.alarms += new
        for sink in self._sinks:
            sink.write(report.step, report.metrics | self._watch.metrics())
        self._console.show(report.step, report.metrics)
        for alarm in new:
            self._console.note(str(alarm))
        self._best.see(report.metrics)
        self.stopped = bool(new) and self._stop_on_alarm
        return Progress.STOP if self.stopped else Progress.MORE

"""What watches a training run from the command line: files, console, alarms, the best adapter."""

from textpolicy.loop import StepReport
from textpolicy.tracking.alarms import Alarm, Watch
from textpolicy.tracking.best import BestAdapter
from textpolicy.tracking.console import Console
from textpolicy.tracking.samples import sample_rows
from textpolicy.tracking.tracker import Tracker
from textpolicy.types import Progress


class Observer:
    """Takes each step's report, and stops the run at the first alarm if that was asked for."""

    def __init__(
        self, tracker: Tracker, console: Console, best: BestAdapter, *, stop_on_alarm: bool
    ) -> None:
        self._tracker = tracker
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
        samples = sample_rows(report.step, report.trained, report.advantages)
        self._tracker.write_samples(report.step, samples)
        self._tracker.write(report.step, report.metrics | self._watch.metrics())
        self._console.show(report.step, report.metrics)
        for alarm in new:
            self._console.note(str(alarm))
        self._best.see(report.metrics)
        self.stopped = bool(new) and self._stop_on_alarm
        return Progress.STOP if self.stopped else Progress.MORE

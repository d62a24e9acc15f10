"""What watches a training run from the command line: files, console, alarms, the best adapter."""

from collections.abc import Sequence

from textpolicy.evaluation import Evaluator, Score
from textpolicy.loop import StepReport
from textpolicy.tracking.alarms import Alarm, Watch
from textpolicy.tracking.best import BestAdapter
from textpolicy.tracking.console import Console
from textpolicy.tracking.sink import Sink
from textpolicy.types import Metrics, Progress


class Observer:
    """Takes each step's report, and stops the run at the first alarm if that was asked for.

    Every `every` steps it evaluates: the numbers stand in the row of the step that follows, whose
    adapters they are of. The best adapter is then the best evaluated one.
    """

    def __init__(
        self,
        sinks: Sequence[Sink],
        console: Console,
        best: BestAdapter,
        evaluator: Evaluator,
        *,
        every: int | None,
        stop_on_alarm: bool,
    ) -> None:
        self._sinks = sinks
        self._console = console
        self._best = best
        self._evaluator = evaluator
        self._every = every
        self._stop_on_alarm = stop_on_alarm
        self._watch = Watch()
        self._evaluated: Metrics = {}
        self.alarms: list[Alarm] = []
        self.steps = 0
        self.stopped = False

    def evaluate(self, when: str) -> Score:
        """Measure the policy as it is now, for the next row."""
        score, self._evaluated = self._evaluator()
        if self._every:
            self._best.measured(score.reward)
        note = f"{when}  {score}  greedy reward on {score.count} held-out tasks"
        self._console.note(note)
        return score

    def see(self, report: StepReport) -> Progress:
        self.steps = report.step + 1
        new = self._watch.see(report.step, report.metrics)
        self.alarms += new
        self._write(report.step, report.metrics | self._watch.metrics())
        self._console.show(report.step, report.metrics)
        for alarm in new:
            self._console.note(str(alarm))
        if not self._every:
            self._best.see(report.metrics)
        elif self.steps % self._every == 0 and self.steps < report.steps:
            self.evaluate(f"step {self.steps}")
        self.stopped = bool(new) and self._stop_on_alarm
        return Progress.STOP if self.stopped else Progress.MORE

    def finish(self, version: int) -> Score:
        """Measure the last adapters, which no step follows: they get a row of their own."""
        score = self.evaluate("after ")
        self._write(self.steps, {"version": float(version)})
        return score

    def _write(self, step: int, metrics: Metrics) -> None:
        for sink in self._sinks:
            sink.write(step, metrics | self._evaluated)
        self._evaluated = {}

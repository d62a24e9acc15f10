"""What watches a training run from the command line: files, console, alarms, the best adapter."""

from collections.abc import Iterable, Mapping

from textpolicy.evaluation import Evaluator, MeanReward
from textpolicy.loop import StepReport
from textpolicy.runs import RunDirectory
from textpolicy.tracking.alarms import Alarm, AlarmMonitor
from textpolicy.tracking.best import BestAdapter
from textpolicy.tracking.console import Console
from textpolicy.tracking.samples import sample_rows
from textpolicy.tracking.tracker import Tracker
from textpolicy.types import Metrics, Progress


class Observer:
    """Takes each step's report, and stops the run at the first alarm if that was asked for.

    Every `every` steps it evaluates: the numbers stand in the row of the step that follows, whose
    adapters they are of. The best adapter is then the best evaluated one.
    """

    def __init__(
        self,
        directory: RunDirectory,
        tracker: Tracker,
        console: Console,
        best: BestAdapter,
        evaluator: Evaluator,
        *,
        every: int | None,
        stop_on_alarm: bool,
    ) -> None:
        self._directory = directory
        self._tracker = tracker
        self._console = console
        self._best = best
        self._evaluator = evaluator
        self._every = every
        self._stop_on_alarm = stop_on_alarm
        self._monitor = AlarmMonitor()
        self._evaluated: Metrics = {}
        self.alarms: list[Alarm] = []
        self.steps = 0
        self.stopped = False

    def go_on(self, rows: Iterable[Mapping[str, float]], steps: int) -> None:
        """Take up a run whose first `steps` steps wrote these rows."""
        for row in rows:
            metrics = {name: value for name, value in row.items() if name != "step"}
            self.alarms += self._monitor.check(int(row["step"]), metrics)
            self._best.replay(metrics, evaluated=self._every is not None)
        self.steps = steps
        if self._every and steps % self._every == 0:
            # What was measured for the row that follows was not in any row yet.
            self.evaluate(f"step {steps}")

    def score_in(self, row: Mapping[str, float]) -> MeanReward:
        """The greedy score that a row holds."""
        return MeanReward(
            reward=row["eval/reward"],
            standard_error=row["eval/standard_error"],
            count=len(self._evaluator.heldout.tasks),
        )

    def evaluate(self, when: str) -> MeanReward:
        """Measure the policy as it is now, for the next row."""
        score, self._evaluated = self._evaluator()
        if self._every:
            self._best.measured(score.reward)
        self._directory.keep_latest_adapter()
        note = f"{when}  {score}  greedy reward on {score.count} held-out tasks"
        self._console.note(note)
        return score

    def see(self, report: StepReport) -> Progress:
        self.steps = report.step + 1
        new = self._monitor.check(report.step, report.metrics)
        self.alarms += new
        samples = sample_rows(report.step, report.trained, report.advantages)
        self._tracker.write_samples(report.step, samples)
        metrics = report.metrics | self._evaluated
        self._write(report.step, report.metrics | self._monitor.metrics())
        self._console.show(report.step, metrics, samples)
        for alarm in new:
            self._console.note(str(alarm))
        if not self._every:
            self._best.see(report.metrics)
        elif self.steps % self._every == 0 and self.steps < report.steps:
            self.evaluate(f"step {self.steps}")
        self.stopped = bool(new) and self._stop_on_alarm
        return Progress.STOP if self.stopped else Progress.MORE

    def finish(self, version: int) -> MeanReward:
        """Measure the last adapters, which no step follows: they get a row of their own."""
        score = self.evaluate("after ")
        self._write(self.steps, {"version": float(version)})
        return score

    def _write(self, step: int, metrics: Metrics) -> None:
        self._tracker.write(step, metrics | self._evaluated)
        self._evaluated = {}

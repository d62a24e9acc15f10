"""Watches the steps of a run: files, alarms, evaluations and the best adapter."""

from collections.abc import Iterable, Mapping
from typing import Any

from textpolicy.evaluation import Evaluator
from textpolicy.evaluation.right_answers import right_answer_metrics
from textpolicy.experiment.announced_time import AnnouncedTime
from textpolicy.experiment.events import Measurement, Reporter
from textpolicy.experiment.watchdog import Watchdog
from textpolicy.loop import StepReport
from textpolicy.machine import MemoryPressure
from textpolicy.planning.time_plan import TimePlan
from textpolicy.runs import RunDirectory
from textpolicy.tracking.alarm_advice import LearningSettings
from textpolicy.tracking.alarms import AlarmMonitor
from textpolicy.tracking.best import BestAdapter
from textpolicy.tracking.machine_signs import low_disk, low_memory
from textpolicy.tracking.named_numbers import describe_numbers
from textpolicy.tracking.samples import sample_rows
from textpolicy.tracking.tracker import Tracker
from textpolicy.types import Metrics, Progress

MEASURED = "measured"
"""The fact of a checkpoint that says what the run has measured so far."""


class StepObserver:
    """Takes the report of each step, and stops the run at the first alarm if that is asked for.

    Every `every` steps it evaluates the policy. The evaluation after step n is in the row of step
    n + 1, which samples with the evaluated adapters, and the best adapter is then the best
    evaluated one. Without `every`, the best adapter is the one of the best training reward.
    """

    def __init__(
        self,
        directory: RunDirectory,
        tracker: Tracker,
        report: Reporter,
        best: BestAdapter,
        evaluator: Evaluator,
        *,
        every: int | None,
        stop_on_alarm: bool,
        watchdog: Watchdog,
        keep_adapters: int,
        held_out: int,
        learning: LearningSettings | None = None,
        announced: TimePlan | None = None,
    ) -> None:
        self._directory = directory
        self._tracker = tracker
        self._report = report
        self.best = best
        self._evaluator = evaluator
        self._every = every
        self._stop_on_alarm = stop_on_alarm
        self._watchdog = watchdog
        self._keep_adapters = keep_adapters
        self._held_out = held_out
        self._before: Mapping[str, float] = {}
        self._monitor = AlarmMonitor(settings=learning)
        self._pressure = MemoryPressure.now()
        self._evaluated: Metrics = {}
        self._announced = AnnouncedTime(announced, report.note)
        self.alarms: list[str] = []
        self.best_step = 0
        """How many steps were finished when the best adapter sampled, or was measured."""
        self.stopped_by_alarm = False

    @property
    def steps(self) -> int:
        """How many steps are finished."""
        return self._report.step

    def facts(self) -> dict[str, Any]:
        """Return what `restore` needs, as JSON values."""
        return {
            "before": self._before,
            "best": self.best.state(),
            "best_step": self.best_step,
            "every": self._every,
            "evaluated": self._evaluated,
        }

    def restore(
        self, facts: Mapping[str, Any], rows: Iterable[Mapping[str, float]], steps: int
    ) -> Measurement:
        """Continue after `steps` steps, which wrote these rows in an earlier process.

        Return the measurement before the first step.
        """
        self._before = facts["before"]
        for row in rows:
            metrics = {name: value for name, value in row.items() if name != "step"}
            self.alarms += map(str, self._monitor.check(int(row["step"]), metrics))
        self._restore_best(facts)
        self._report.step = steps
        if facts["every"] == self._every:
            # The evaluation after the last step belongs to a row that was not written.
            self._evaluated = facts["evaluated"]
        elif self._every and steps % self._every == 0:
            self.evaluate(f"step {steps}")
        return self.measurement_in(self._before)

    def _restore_best(self, facts: Mapping[str, Any]) -> None:
        best = facts["best"]
        if (facts["every"] is None) != (self._every is None):
            self._report.note(
                "The best adapter was chosen by another measure so far. From now on it is the best "
                f"{'evaluated' if self._every else 'by its training reward'} since this resume"
            )
        elif self.best.restore(best, self._directory.adapter_of(best["version"])):
            self.best_step = facts["best_step"]
        else:
            self._report.note(
                f"{self.best.path} is damaged, or newer than the checkpoint. The best adapter is "
                "chosen again from those that are measured from now on"
            )

    def measurement_in(self, row: Mapping[str, float]) -> Measurement:
        """Return the held-out evaluation that is recorded in a row of metrics."""
        return Measurement(
            name="greedy reward",
            value=row["eval/reward"],
            standard_error=row["eval/standard_error"],
            count=len(self._evaluator.heldout.tasks),
            step=int(row["step"]),
        )

    def evaluate(self, when: str) -> Measurement:
        """Measure the policy as it is now, for the row of the next step."""
        score, self._evaluated = self._evaluator()
        has_more = len(self._evaluator.heldout.tasks) == self._held_out
        if when == "before" and (few := score.few_tasks_note(has_more=has_more)):
            self._report.note(few)
        text, best = f"{when}  {score}  greedy reward on {score.count} held-out tasks", ""
        # Scores of few tasks are often equal, and more training is what the user asked for.
        if self._every and self.best.record_evaluation(score.reward, latest_of_equals=True):
            self.best_step = self.steps
            best = ", the best so far" if self._before else ""
        self._directory.keep_latest_adapter()
        self._directory.remove_kept_adapters(last=self._keep_adapters, best=self.best.version)
        if not self._before:
            names = ("eval/reward", "eval/standard_error")
            self._before = {"step": 0.0, **{name: self._evaluated[name] for name in names}}
        self._report(
            "measurement",
            "  ".join([text, *describe_numbers(self._evaluated, "eval/")]) + best,
            metrics=self._evaluated,
        )
        return self.measurement_in(self._evaluated | {"step": self.steps})

    def on_step(self, step: StepReport) -> Progress:
        """Record a finished step; return STOP if the listener or an alarm ends the run."""
        stalled = self._watchdog.step_ended()
        metrics = step.metrics | self._evaluated
        new = self._monitor.check(
            step.step,
            metrics,
            disk=low_disk(self._directory.checkpoints),
            memory=low_memory(self._pressure, MemoryPressure.now()),
        )
        self.alarms += map(str, new)
        samples = sample_rows(step.step, step.trained, step.advantages)
        self._tracker.write_samples(step.step, samples)
        alarms = self._monitor.metrics() | {"alarm/stalled": float(stalled)}
        self._write(step.step, step.metrics | alarms)
        self._report.step = step.step + 1
        self._report("step", _line(step), metrics=metrics | alarms, samples=samples)
        self._announced.step_ended(step.metrics["time/step"], step.steps - self.steps)
        for alarm in new:
            self._report("alarm", str(alarm))
        sampled_with = min((group.version for group in step.groups), default=None)
        if not self._every and self.best.record_step(step.metrics, sampled_with):
            self.best_step = step.step
        elif self._every and self.steps % self._every == 0 and self.steps < step.steps:
            self.evaluate(f"step {self.steps}")
        collapsed = any(alarm.is_about_learning for alarm in new)
        self.stopped_by_alarm = collapsed and self._stop_on_alarm
        self._watchdog.step_begins()
        stop = self.stopped_by_alarm or self._report.stop_requested
        return Progress.STOP if stop else Progress.MORE

    def finish(self, version: int, data: Metrics) -> Measurement:
        """Measure the last adapters and write a row for them, because no step follows.

        The row has the metrics `data` too.
        """
        measured = self.evaluate("after ")
        self._evaluated |= self._measure_right_answers()
        self._write(self.steps, {"version": float(version)} | data)
        return measured

    def _measure_right_answers(self) -> Metrics:
        """Return what right answers have, if the reward reports numbers beside its value."""
        heldout = self._evaluator.heldout
        reports = any(name.startswith("eval/rewards/") for name in self._evaluated)
        several = len(heldout.scorer.rewards.members) > 1
        return right_answer_metrics(heldout, scored=reports or several)

    def _write(self, step: int, metrics: Metrics) -> None:
        self._tracker.write(step, metrics | self._evaluated)
        self._evaluated = {}


def _line(step: StepReport) -> str:
    reward = step.metrics.get("reward")
    text = "no new groups" if reward is None else f"reward {reward:.3f}"
    return f"step {step.step + 1}/{step.steps}: {text}"

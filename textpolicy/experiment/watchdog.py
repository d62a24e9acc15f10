"""Watches a run from a thread of its own: a step that stalls is reported, and may end the process.

The thread never touches mlx. It reads what the process does now from `textpolicy.activity`. Python
cannot end another thread that waits in a reward function or in an environment. So a run that must
not wait is asked to stop after the step, and if the step does not end, the process is ended as by a
kill: the last checkpoint stays, and what came after it is lost.
"""

import os
import statistics
import time
from collections import deque
from collections.abc import Callable
from threading import Event, Thread

from textpolicy import activity
from textpolicy.config import TrainConfig
from textpolicy.errors import RunInterruptedError
from textpolicy.experiment.assembly import RunConfig
from textpolicy.experiment.events import Reporter
from textpolicy.experiment.resuming import resume_line
from textpolicy.runs import RunDirectory

_FACTOR = 10
_STEPS_FIRST = 5  # whose median is a measure of the steps to come
_LEAST_SECONDS = 10.0  # Shorter steps vary by more than ten times on a busy machine.
_LEAST_MEASURING_SECONDS = 60.0
_WAIT = 0.25


class Watchdog:
    """Reports a step that takes too long; as a context, runs while the block does.

    Too long is `deadline` seconds or, without a deadline, ten times the median of the steps so far,
    once there are five. Outside of steps, as in a measurement, it is too long if nothing moves for
    that time. With `stop` the run is asked to stop after the step, and a step that takes twice too
    long ends the process with the exit code 75. `resume_text` returns what to say about resuming.
    """

    def __init__(
        self,
        report: Reporter,
        *,
        deadline: float | None,
        stop: bool,
        resume_text: Callable[[], str],
        steps_per_generation: int = 1,
    ) -> None:
        self.stalls: list[str] = []
        """What was reported, in order."""
        self._report = report
        self._deadline = deadline
        self._stop = stop
        self._resume_text = resume_text
        # Only one step in so many samples, and that step takes longer than the others.
        self._factor = _FACTOR * steps_per_generation
        self._seconds: deque[float] = deque(maxlen=50)
        self._step_began: float | None = None
        self._reported = False
        self._ended = Event()
        self._thread = Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def step_begins(self) -> None:
        """Start measuring the time of a step."""
        self._reported = False
        self._step_began = time.monotonic()

    def step_ended(self) -> bool:
        """Stop measuring the time of the step. Return whether the step was reported."""
        if self._step_began is not None:
            self.record_step(time.monotonic() - self._step_began)
        reported, self._reported = self._reported, False
        self._step_began = None
        return reported

    def record_step(self, seconds: float) -> None:
        """Add the time of a finished step to the times whose median is the usual time of a step."""
        self._seconds.append(seconds)

    def check_not_stalled(self) -> None:
        """Raise `RunInterruptedError`, with the exit code 75, if a stall has stopped the run."""
        if self._stop and self.stalls:
            raise RunInterruptedError(f"{self.stalls[-1]}. {self._resume_text()}")

    @property
    def limit(self) -> float | None:
        """Return the seconds after which a step is reported, or None while that is not known."""
        if self._deadline is not None:
            return self._deadline
        if len(self._seconds) < _STEPS_FIRST:
            return None
        return max(_LEAST_SECONDS, self._factor * statistics.median(self._seconds))

    def _watch(self) -> None:
        while not self._ended.wait(_WAIT):
            began, limit = self._step_began, self.limit
            if limit is None:
                continue
            waited = activity.seconds_without_a_change()
            if began is not None:
                waited = time.monotonic() - began
            elif self._deadline is None:
                limit = max(limit, _LEAST_MEASURING_SECONDS)
            if waited >= limit and not self._reported:
                self._report_stall(waited, in_step=began is not None)
            if waited >= 2 * limit and self._stop:
                self._end_process(waited)

    def _report_stall(self, waited: float, *, in_step: bool) -> None:
        self._reported = True
        usual = f"more than --step-deadline {self._deadline:g}"
        if self._deadline is None:
            usual = f"and a step takes {statistics.median(self._seconds):.1f} s at the median"
        what = f"step {self._report.step + 1} has taken {waited:.0f} s"
        if not in_step:
            what = f"nothing has moved for {waited:.0f} s after step {self._report.step}"
        text = f"{what}, {usual}. Now: {activity.described()}"
        self.stalls.append(text)
        if self._stop:
            self._report.stop_requested = True
            text += ". The run stops after this step, and at twice this time the process ends"
        self._report("alarm", f"alarm: stalled: {text}")

    def _end_process(self, waited: float) -> None:
        self._report(
            "killed",
            f"the run still waits after {waited:.0f} s for: {activity.described()}. No checkpoint "
            f"of this step can be saved while it waits, so the process ends. {self._resume_text()}",
        )
        os._exit(os.EX_TEMPFAIL)


def watch(config: RunConfig, directory: RunDirectory, report: Reporter) -> Watchdog:
    """Return the watchdog of a run, with the deadline of its config."""
    in_rl = isinstance(config, TrainConfig)
    return Watchdog(
        report,
        deadline=config.run.step_deadline,
        stop=config.run.stop_on_stall,
        resume_text=lambda: _resume_text(config, directory),
        steps_per_generation=config.rollout.steps_per_generation if in_rl else 1,
    )


def _resume_text(config: RunConfig, directory: RunDirectory) -> str:
    saved = sorted(directory.checkpoints.glob("*.safetensors"))
    last = f"The last checkpoint is of step {int(saved[-1].stem)}" if saved else "No step is saved"
    return f"{last}. Resume the run with: {resume_line(directory, config)}"

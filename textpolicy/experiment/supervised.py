"""A run of supervised training: data, adapters, checkpoints, tracking, and the result."""

import time

import mlx.core as mx

from textpolicy.activity import doing
from textpolicy.config import SFTConfig
from textpolicy.experiment.assembly import (
    adapt,
    dtype_of,
    load_sft_data,
    open_run_tracker,
    optimizer_of,
    sft_parameters,
    template_arguments_of,
)
from textpolicy.experiment.events import EventKind, Measurement, Reporter, RunResult
from textpolicy.experiment.first_prompt import describe_prompt
from textpolicy.experiment.resuming import Start, resume_line, save_options
from textpolicy.experiment.watchdog import Watchdog, watch
from textpolicy.generation.mlx_generation import load_model
from textpolicy.machine import MemoryPressure
from textpolicy.runs import RunDirectory
from textpolicy.tracking.alarms import Alarm
from textpolicy.tracking.machine_signs import low_memory
from textpolicy.tracking.run_history import format_duration
from textpolicy.tracking.tracker import Tracker
from textpolicy.training.sft import (
    SaveReport,
    SFTEvent,
    TrainReport,
    ValidationReport,
    evaluate_sft,
    train_sft,
)
from textpolicy.types import Metrics, Progress

_LOSS = "validation/loss"
_KINDS: dict[type[SFTEvent], EventKind] = {
    TrainReport: "step",
    ValidationReport: "measurement",
    SaveReport: "saved",
}


def train_supervised(
    config: SFTConfig, directory: RunDirectory, report: Reporter, start: Start
) -> RunResult:
    """Train adapters on rows of text, from the checkpoint of `start` if it has one."""
    started = time.perf_counter()
    model, tokenizer = load_model(config.model.name, dtype=dtype_of(config.model))
    data = start.parts.data or load_sft_data(config, tokenizer)
    report.note(str(data))
    first = data.train[0]
    if (length := first.mask.index(True)) > 1:
        arguments = template_arguments_of(config.model, tokenizer)
        report.note(describe_prompt(tokenizer, first.tokens[:length], arguments))
    if data.valid_rows and all(row.keys() >= {"prompt", "completion"} for row in data.valid_rows):
        directory.write_validation_rows(data.valid_rows)
    adapt(model, config.adapter, config.model, config.run.seed)
    parameters = sft_parameters(config, directory, data)
    resume = start.resume
    report.step = first_step = resume.step if resume else 0
    optimizer = optimizer_of(config.trainer, parameters.iterations)
    mx.random.seed(config.run.seed)
    mx.reset_peak_memory()
    if resume is None:
        save_options(config, directory, start)
    elif resume.step == parameters.iterations:
        report.note(
            f"The run is finished: all {resume.step} updates are done. For more updates, type: "
            f"{resume_line(directory, config)} --iterations {2 * resume.step}"
        )
    report("start", f"resuming after update {first_step}" if resume else "training starts")
    tracking = open_run_tracker(
        config, directory, report.note, resume_step=first_step + 1 if resume else 0, sample_groups=0
    )
    with tracking as tracker, watch(config, directory, report) as watchdog:
        recorder = _Recorder(
            config, directory, tracker, report, start, watchdog, parameters.iterations
        )
        result = train_sft(
            model,
            data.train,
            data.valid,
            optimizer,
            parameters=parameters,
            checkpoints=start.checkpoints,
            resume=resume,
            on_progress=recorder.on_progress,
            on_update=recorder.on_update,
        )
    report.step = result.iteration
    if result.ended == "stopped":
        watchdog.check_not_stalled()
    test = None
    if data.test:
        loss = evaluate_sft(model, data.test, batch_size=config.trainer.batch_size)
        test = Measurement(name="test loss", value=loss, step=result.iteration)
    return RunResult(
        directory=directory,
        ended=result.ended,
        steps=result.iteration,
        updates=result.iteration - first_step,
        seconds=time.perf_counter() - started,
        before=_loss(result.first_loss, 0),
        after=_loss(result.validation_loss, result.iteration) if result.iteration else None,
        best=_loss(result.best_loss, result.best_iteration or 0),
        test=test,
        alarms=(*recorder.alarms, *watchdog.stalls),
        facts={"data": str(data), "truncated": data.truncated, "dropped": data.dropped},
    )


class _Recorder:
    """Writes the events of `train_sft` to the tracker and passes them on as events of the run."""

    def __init__(
        self,
        config: SFTConfig,
        directory: RunDirectory,
        tracker: Tracker,
        report: Reporter,
        start: Start,
        watchdog: Watchdog,
        iterations: int,
    ) -> None:
        self._config = config
        self._directory = directory
        self._tracker = tracker
        self._report = report
        self._start = start
        self._watchdog = watchdog
        self._iterations = iterations
        self._first = True
        self._stalled = False
        self._pressure = MemoryPressure.now()
        self.alarms: list[str] = []
        self._updated = time.monotonic()

    def _report_low_memory(self, iteration: int) -> bool:
        """Return whether the machine swaps; report it the first time."""
        sign = low_memory(self._pressure, MemoryPressure.now())
        if sign and not self.alarms:
            self.alarms.append(str(Alarm("memory", iteration - 1, *sign)))
            self._report("alarm", self.alarms[0])
        return sign is not None

    @doing("reporting")
    def on_progress(self, event: SFTEvent) -> Progress:
        """Record an event; return STOP if the listener ends the run."""
        if self._first:
            # The first event shows that a resumed checkpoint fits these options.
            save_options(self._config, self._directory, self._start)
            self._first = False
        metrics = _metrics(event)
        if isinstance(event, TrainReport):
            metrics["alarm/stalled"] = float(self._stalled)
            self._stalled = False
            metrics["alarm/memory"] = float(self._report_low_memory(event.iteration))
        if metrics:
            self._tracker.write(event.iteration, metrics)
        self._report.step = event.iteration
        self._report(_KINDS[type(event)], self._text(event), metrics=metrics)
        return self._answer()

    def _text(self, event: SFTEvent) -> str:
        """Return the event in words, with the time left at the speed of the last updates."""
        if not isinstance(event, TrainReport):
            return str(event)
        left = (self._iterations - event.iteration) / event.iterations_per_second
        return f"{event}, {format_duration(left)} left"

    def on_update(self, iteration: int) -> Progress:
        """Tell the watchdog that an update is done; return STOP if a stall ends the run."""
        now = time.monotonic()
        self._watchdog.record_step(now - self._updated)
        self._updated = now
        self._stalled |= self._watchdog.step_ended()
        self._report.step = iteration
        return self._answer()

    def _answer(self) -> Progress:
        return Progress.STOP if self._report.stop_requested else Progress.MORE


def _metrics(event: SFTEvent) -> Metrics:
    match event:
        case TrainReport():
            return {
                "loss": event.loss,
                "learning_rate": event.learning_rate,
                "iterations_per_second": event.iterations_per_second,
                "tokens_per_second": event.tokens_per_second,
                "memory/peak_gb": mx.get_peak_memory() / 1e9,
            }
        case ValidationReport():
            return {_LOSS: event.loss, "time/validation": event.seconds}
        case SaveReport():
            return {}


def _loss(value: float | None, step: int) -> Measurement | None:
    return None if value is None else Measurement(name="validation loss", value=value, step=step)

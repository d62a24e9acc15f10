"""Tracker: writes metrics and samples to all sinks. A failing sink neither ends nor slows a run."""

import time
from collections.abc import Callable, Mapping, Sequence

from textpolicy.activity import doing
from textpolicy.tracking.faults import attempt
from textpolicy.tracking.samples import first_whole_groups
from textpolicy.tracking.sink import BackgroundSink, SampleRow, Sink
from textpolicy.tracking.values import to_floats

PATIENCE = 60.0
# The share of `patience` for `close`. A service may need the rest when the process ends.
CLOSING_SHARE = 0.55


class Tracker:
    """Writes to `files` directly and to `services` in threads. As a context, closes every sink.

    A sink that fails is switched off: `notice` gets one message, and the metric `sink_errors` of
    each row counts the sink. The services delay the end of the process by at most `patience`
    seconds. Files get the samples of each step, or of its first `sample_groups` groups. Services
    get at most `samples_rows` of these samples, in every `samples_every`-th step.
    """

    def __init__(
        self,
        files: Sequence[Sink],
        services: Sequence[BackgroundSink] = (),
        *,
        notice: Callable[[str], None],
        patience: float = PATIENCE,
        samples_every: int = 10,
        samples_rows: int = 64,
        sample_groups: int | None = None,
    ) -> None:
        self._files = list(files)
        self._services = list(services)
        self._notice = notice
        self._patience = patience
        self._samples_every = samples_every
        self._samples_rows = samples_rows
        self._sample_groups = sample_groups
        self._left_out: set[str] = set()
        self.errors = 0
        """The number of sinks that were switched off, and of metrics that are not numbers."""

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @doing("writing the metrics")
    def write(self, step: int, metrics: Mapping[str, object]) -> None:
        """Write the metrics of `step`: numbers, arrays, and mappings of numbers and arrays."""
        values, left_out = to_floats(metrics)
        for name in left_out:
            if name not in self._left_out:
                self._report_error(f"metric {name!r} is not a number and was left out")
        self._left_out.update(left_out)
        self._check_services()
        values["sink_errors"] = float(self.errors)
        self._to_files(lambda sink: sink.write(step, values))
        for service in self._services:
            service.write(step, values)

    def write_samples(self, step: int, samples: Sequence[SampleRow]) -> None:
        """Write the samples of `step`. Call `write_samples` before `write` of the same step."""
        if (limit := self._sample_groups) is not None:
            samples = [sample for sample in samples if sample["group"] < limit]
        self._to_files(lambda sink: sink.write_samples(step, samples))
        if step % self._samples_every == 0:
            few = first_whole_groups(samples, self._samples_rows)
            for service in self._services:
                service.write_samples(step, few)

    @doing("waiting for the tracking services")
    def close(self) -> None:
        """Close every sink. All services finish at the same time."""
        self._to_files(lambda sink: sink.close())
        deadline = time.monotonic() + CLOSING_SHARE * self._patience
        for service in self._services:
            service.end()
        for service in self._services:
            service.join(deadline)
        self._check_services()
        self._files, self._services = [], []

    def _to_files(self, action: Callable[[Sink], None]) -> None:
        for sink in list(self._files):
            if fault := attempt(lambda sink=sink: action(sink)):
                self._files.remove(sink)
                self._report_error(f"{type(sink).__name__} is switched off: {fault}")

    def _check_services(self) -> None:
        """Pass on the messages of services, and drop the services that failed."""
        for service in list(self._services):
            for text in service.notices():
                self._notice(f"{service.name}: {text}")
            if service.fault:
                self._services.remove(service)
                self._report_error(f"{service.name} is switched off: {service.fault}")

    def _report_error(self, text: str) -> None:
        self.errors += 1
        self._notice(text)

"""Everything that a run reports, to every sink; nothing that a sink does ends or slows the run."""

import time
from collections.abc import Callable, Mapping, Sequence

from textpolicy.tracking.background_sink import BackgroundSink
from textpolicy.tracking.faults import attempt
from textpolicy.tracking.samples import first_whole_groups
from textpolicy.tracking.sink import SampleRow, Sink
from textpolicy.tracking.values import to_floats

PATIENCE = 60.0
# The share of it that `close` may take; a service may need the rest when the process ends.
CLOSING_SHARE = 0.55


class Tracker:
    """Writes to `files` at once and to `services` from threads; a context that closes both.

    A sink that fails is switched off, named once to `notice`, and counted in the metric
    `sink_errors`, which every row has. A service that does not finish holds up the end of the
    process by `patience` seconds at most. Of the samples of a step only the first `sample_groups`
    groups are written, if that is given. Services get the samples of every `samples_every`-th
    step, at most `samples_rows` of them.
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
        """Sinks that were switched off, and names that had no number."""

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def write(self, step: int, metrics: Mapping[str, object]) -> None:
        """Write the metrics of `step`: numbers, arrays, and mappings of them."""
        values, left_out = to_floats(metrics)
        for name in left_out:
            if name not in self._left_out:
                self._count(f"metric {name!r} is no number and was left out")
        self._left_out.update(left_out)
        self._poll()
        values["sink_errors"] = float(self.errors)
        self._to_files(lambda sink: sink.write(step, values))
        for service in self._services:
            service.write(step, values)

    def write_samples(self, step: int, samples: Sequence[SampleRow]) -> None:
        """Write the samples of `step`, before its metrics."""
        if (most := self._sample_groups) is not None:
            samples = [sample for sample in samples if sample["group"] < most]
        self._to_files(lambda sink: sink.write_samples(step, samples))
        if step % self._samples_every == 0:
            few = first_whole_groups(samples, self._samples_rows)
            for service in self._services:
                service.write_samples(step, few)

    def close(self) -> None:
        """Close every sink; all services finish at the same time."""
        self._to_files(lambda sink: sink.close())
        deadline = time.monotonic() + CLOSING_SHARE * self._patience
        for service in self._services:
            service.end()
        for service in self._services:
            service.join(deadline)
        self._poll()
        self._files, self._services = [], []

    def _to_files(self, action: Callable[[Sink], None]) -> None:
        for sink in list(self._files):
            if fault := attempt(lambda sink=sink: action(sink)):
                self._files.remove(sink)
                self._count(f"{type(sink).__name__} is switched off: {fault}")

    def _poll(self) -> None:
        """Pass on what services said, and drop those that failed."""
        for service in list(self._services):
            for text in service.notices():
                self._notice(f"{service.name}: {text}")
            if service.fault:
                self._services.remove(service)
                self._count(f"{service.name} is switched off: {service.fault}")

    def _count(self, text: str) -> None:
        self.errors += 1
        self._notice(text)

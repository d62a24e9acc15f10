"""Sink: the protocol of files and services that record metrics and samples.

BackgroundSink is a sink on its own thread, so that the run never waits for the sink.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from queue import Full, Queue, SimpleQueue
from threading import Thread
from typing import Any, Protocol, runtime_checkable

from textpolicy.tracking.faults import attempt
from textpolicy.types import Metrics

SampleRow = Mapping[str, Any]
"""One completion with its reward and advantage, as JSON values. See `samples.sample_rows`."""

Notify = Callable[[str], None]
"""Takes a message for the user."""

# A service may take some minutes to connect; this many writes of short steps wait meanwhile.
_QUEUE_CAPACITY = 1024


@runtime_checkable
class Sink(Protocol):
    """Records what each step reports, until `close`.

    The samples of a step come before its metrics. A step may be written several times, with other
    metrics each time. Step numbers never decrease.
    """

    def write(self, step: int, metrics: Metrics) -> None:
        """Record `metrics` of the step `step`, which is counted from 0."""
        ...

    def write_samples(self, step: int, samples: Sequence[SampleRow]) -> None:
        """Record completions that step `step` was trained on."""
        ...

    def close(self) -> None:
        """Write what is left and close the sink. No calls may follow."""
        ...


class BackgroundSink:
    """Opens a sink and writes to it in a thread. `fault` is why the sink was stopped, or None.

    Writes wait in a queue. A sink that raises an error, or has `capacity` writes waiting, gets no
    more writes. Values must be plain Python, because mlx arrays cannot be passed to a thread.
    """

    def __init__(
        self, name: str, open_sink: Callable[[Notify], Sink], *, capacity: int = _QUEUE_CAPACITY
    ) -> None:
        self.name = name
        self.fault: str | None = None
        self._open = open_sink
        self._jobs: Queue[Callable[[Sink], None] | None] = Queue(capacity)
        self._notices: SimpleQueue[str] = SimpleQueue()
        # A daemon thread, so that a hanging sink cannot keep the process from ending.
        self._thread = Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def write(self, step: int, metrics: Metrics) -> None:
        """Queue the metrics of a step."""
        self._put(lambda sink: sink.write(step, metrics))

    def write_samples(self, step: int, samples: Sequence[SampleRow]) -> None:
        """Queue the samples of a step."""
        self._put(lambda sink: sink.write_samples(step, samples))

    def end(self) -> None:
        """Tell the sink to close after the queued writes. No writes may follow."""
        self._put(None)

    def join(self, deadline: float) -> None:
        """Wait until the sink is closed, or until `time.monotonic()` reaches `deadline`."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive() and not self.fault:
            self.fault = f"it did not finish in time, with {self._jobs.qsize()} writes to go"

    def notices(self) -> list[str]:
        """Return the sink's messages since the last call."""
        return [self._notices.get() for _ in range(self._notices.qsize())]

    def _put(self, job: Callable[[Sink], None] | None) -> None:
        if self.fault:
            return
        try:
            self._jobs.put_nowait(job)
        except Full:
            self.fault = f"it fell {self._jobs.maxsize} writes behind"

    def _work(self) -> None:
        opened: list[Sink] = []
        fault = attempt(lambda: opened.append(self._open(self._notices.put)))
        if not fault:
            fault = attempt(lambda: self._write_all(opened[0]))
            close_fault = attempt(opened[0].close)
            fault = fault or close_fault
        self.fault = self.fault or fault

    def _write_all(self, sink: Sink) -> None:
        while not self.fault and (job := self._jobs.get()) is not None:
            job(sink)

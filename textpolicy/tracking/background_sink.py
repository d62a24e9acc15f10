"""A sink on a thread of its own, so that the run never waits for it."""

import time
from collections.abc import Callable, Sequence
from queue import Empty, Full, Queue, SimpleQueue
from threading import Thread

from textpolicy.tracking.faults import attempt
from textpolicy.tracking.sink import SampleRow, Sink
from textpolicy.types import Metrics

# Some minutes of short steps: longer than it takes any service to begin.
_QUEUE_CAPACITY = 1024

Notify = Callable[[str], None]


class BackgroundSink:
    """Opens a sink and writes to it, apart from the run; `fault` says why it no longer does.

    What is written waits in a queue. A sink that raises, or that falls `capacity` writes behind,
    is written to no more. Values must be plain: mlx arrays cannot cross threads.
    """

    def __init__(
        self, name: str, open_sink: Callable[[Notify], Sink], *, capacity: int = _QUEUE_CAPACITY
    ):
        self.name = name
        self.fault: str | None = None
        self._open = open_sink
        self._jobs: Queue[Callable[[Sink], None] | None] = Queue(capacity)
        self._notices: SimpleQueue[str] = SimpleQueue()
        # A daemon: a sink that hangs must not keep the process from ending.
        self._thread = Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def write(self, step: int, metrics: Metrics) -> None:
        """Hand over metrics."""
        self._put(lambda sink: sink.write(step, metrics))

    def write_samples(self, step: int, samples: Sequence[SampleRow]) -> None:
        """Hand over samples."""
        self._put(lambda sink: sink.write_samples(step, samples))

    def end(self) -> None:
        """Nothing follows: the sink may close as soon as it has written what waits."""
        self._put(None)

    def join(self, deadline: float) -> None:
        """Wait for the sink to close, until `time.monotonic()` is `deadline`."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive() and not self.fault:
            self.fault = f"it did not finish in time, with {self._jobs.qsize()} writes to go"

    def notices(self) -> list[str]:
        """What the sink has said since the last call."""
        said: list[str] = []
        try:
            while True:
                said.append(self._notices.get_nowait())
        except Empty:
            return said

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
            closing = attempt(opened[0].close)
            fault = fault or closing
        self.fault = self.fault or fault

    def _write_all(self, sink: Sink) -> None:
        while not self.fault and (job := self._jobs.get()) is not None:
            job(sink)

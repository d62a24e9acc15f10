"""What a run reports while it trains, and what it returns at its end."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from textpolicy.runs import RunDirectory
from textpolicy.tracking.sink import SampleRow
from textpolicy.types import Metrics, Progress, asks_to_stop

EventKind = Literal["note", "start", "step", "measurement", "alarm", "doubt", "saved", "killed"]
RunEnd = Literal["finished", "stopped", "alarm", "early"]
"""Why a run ended: all steps done, stopped by its listener, by an alarm, or out of patience."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A number that was measured on data the run does not train on.

    `name` is "greedy reward" in reinforcement learning and "validation loss" or "test loss" in
    supervised training. `step` is the number of finished steps at which it was measured.
    """

    name: str
    value: float
    step: int
    standard_error: float | None = None
    count: int | None = None
    """How many held-out tasks were measured."""

    def __str__(self) -> str:
        if self.standard_error is None:
            return f"{self.value:.4f}"
        return f"{self.value:.3f} ± {self.standard_error:.3f}"


@dataclass(frozen=True, kw_only=True)
class RunEvent:
    """Something that happened in a run.

    "start" comes when the model is loaded, before the first measurement. A "step" has the metrics
    and samples of a step or, in supervised training, the metrics since the last report. `step`
    counts finished steps. A "doubt" comes at the end of a run. "killed" comes when the watchdog
    ends the process right after it; this event and a stall's "alarm" come from the watchdog's
    thread. `text` is one line for people, and may quote the model or files.
    """

    kind: EventKind
    step: int
    text: str
    metrics: Metrics = field(default_factory=dict[str, float])
    samples: Sequence[SampleRow] = ()

    def __str__(self) -> str:
        return self.text


EventListener = Callable[[RunEvent], Progress | Literal[False] | None]
"""A function that is called with every event; the run stops after the step if it returns STOP.

None and False continue the run, so that `lambda event: event.kind == "note" and print(event)` may
be a listener.
"""


class Reporter:
    """Hands the events of a run to its listener and remembers whether the listener said STOP."""

    def __init__(self, listener: EventListener | None) -> None:
        self._listener = listener
        self.step = 0
        self.stop_requested = False

    def __call__(
        self,
        kind: EventKind,
        text: str,
        *,
        metrics: Metrics | None = None,
        samples: Sequence[SampleRow] = (),
    ) -> None:
        """Report an event at the present step."""
        event = RunEvent(
            kind=kind, step=self.step, text=text, metrics=metrics or {}, samples=samples
        )
        if self._listener and asks_to_stop(self._listener(event), "on_event"):
            self.stop_requested = True

    def note(self, text: str) -> None:
        """Report a line for people."""
        self("note", text)


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run achieved. `seconds` are those of this process.

    `steps` counts finished steps and `updates` the updates of this process: a step whose groups
    all have equal rewards makes none. `after` is None if the run was stopped before its last step,
    and both measurements are None if there was nothing to measure on. `best` is the measurement of
    the adapters in `directory.best`. `doubts` say why the policy may earn more without doing the
    task. `facts` holds other numbers, such as how many rows were cut.
    """

    directory: RunDirectory
    ended: RunEnd
    steps: int
    updates: int
    seconds: float
    before: Measurement | None
    after: Measurement | None
    best: Measurement | None
    test: Measurement | None = None
    alarms: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])

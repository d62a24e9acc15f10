"""Where a run's numbers and samples go: files always, services if asked."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from textpolicy.types import Metrics

SampleRow = Mapping[str, Any]
"""One completion and what became of it, in types that JSON has; see `samples.sample_rows`."""


@runtime_checkable
class Sink(Protocol):
    """Takes what each step reports until it is closed.

    A step's samples come before its metrics. A step may be written more than once, with other
    metrics each time; steps never go back.
    """

    def write(self, step: int, metrics: Metrics) -> None:
        """Record `metrics` as those of `step`, counted from 0."""
        ...

    def write_samples(self, step: int, samples: Sequence[SampleRow]) -> None:
        """Record completions that `step` learned from."""
        ...

    def close(self) -> None:
        """Nothing follows: hand over what is left."""
        ...

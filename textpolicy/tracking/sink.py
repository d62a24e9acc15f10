"""Where the numbers of a run go: a file always, a service if asked."""

from typing import Protocol, runtime_checkable

from textpolicy.types import Metrics


@runtime_checkable
class Sink(Protocol):
    """Takes each step's metrics until it is closed."""

    def write(self, step: int, metrics: Metrics) -> None:
        """Record `metrics` as those of `step`, counted from 0."""
        ...

    def close(self) -> None:
        """Nothing follows: hand over what is left."""
        ...

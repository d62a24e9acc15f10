"""Sink: the protocol of files and services that record metrics and samples."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from textpolicy.types import Metrics

SampleRow = Mapping[str, Any]
"""One completion with its reward and advantage, as JSON values. See `samples.sample_rows`."""


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

"""TensorBoardRun: a sink that writes TensorBoard event files."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from textpolicy.tracking.sink import SampleRow
from textpolicy.types import Metrics


class TensorBoardRun:
    """Writes to `folder`, which `tensorboard --logdir` can show during the run.

    A viewer hides what an earlier process wrote for step `resume_step` and later steps.
    """

    def __init__(self, folder: Path, *, resume_step: int = 0) -> None:
        tensorboard: Any = import_module("tensorboardX")
        self._writer = tensorboard.SummaryWriter(str(folder), purge_step=resume_step or None)

    def write(self, step: int, metrics: Metrics) -> None:
        """Write each metric as a scalar under its own name."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def write_samples(self, step: int, samples: Sequence[SampleRow]) -> None:
        """Write nothing, because event files have no tables. The samples are in samples.jsonl."""

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()

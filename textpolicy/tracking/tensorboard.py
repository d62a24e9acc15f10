"""A run in TensorBoard's event files: each metric a scalar under its own name."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from textpolicy.tracking.sink import SampleRow
from textpolicy.types import Metrics


class TensorBoardRun:
    """Writes to `folder`, which `tensorboard --logdir` shows while the run goes on.

    Rows that an earlier process wrote for `resume_step` and later steps are hidden.
    """

    def __init__(self, folder: Path, *, resume_step: int = 0) -> None:
        tensorboard: Any = import_module("tensorboardX")
        self._writer = tensorboard.SummaryWriter(str(folder), purge_step=resume_step or None)

    def write(self, step: int, metrics: Metrics) -> None:
        """Write `metrics` at `step`; a viewer finds them within seconds."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def write_samples(self, step: int, samples: Sequence[SampleRow]) -> None:
        """Nothing: event files have no tables, and samples.jsonl has every completion."""

    def close(self) -> None:
        """Close the file."""
        self._writer.close()

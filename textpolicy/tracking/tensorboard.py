"""A run in TensorBoard's event files: each metric a scalar under its own name."""

from importlib import import_module
from pathlib import Path
from typing import Any

from textpolicy.errors import ConfigError
from textpolicy.types import Metrics


class TensorBoardRun:
    """Writes to `folder`, which `tensorboard --logdir` shows while the run goes on."""

    def __init__(self, folder: Path) -> None:
        try:
            tensorboard: Any = import_module("tensorboardX")
        except ImportError as error:
            raise ConfigError(
                "logging to TensorBoard needs tensorboardX: pip install 'textpolicy[tensorboard]'"
            ) from error
        self._writer = tensorboard.SummaryWriter(str(folder), write_to_disk=True)

    def write(self, step: int, metrics: Metrics) -> None:
        """Write `metrics` at `step`, where a viewer finds them at once."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()

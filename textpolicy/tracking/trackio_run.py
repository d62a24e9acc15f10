"""A run in trackio: an SQLite file on this machine that `trackio show` opens."""

import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from importlib import import_module
from typing import Any

from textpolicy.tracking.sink import SampleRow
from textpolicy.tracking.values import to_json_number
from textpolicy.types import Metrics


class TrackioRun:
    """Logs to `project` under `name`; a known name is gone on with."""

    def __init__(self, project: str, *, name: str, config: Mapping[str, Any]) -> None:
        trackio: Any = import_module("trackio")
        # trackio prints what it does, and standard output belongs to the command's answer.
        with redirect_stdout(sys.stderr):
            self._run = trackio.init(
                project=project,
                name=name,
                config=dict(config),
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def write(self, step: int, metrics: Metrics) -> None:
        """Log `metrics` at `step`."""
        self._run.log({name: to_json_number(value) for name, value in metrics.items()}, step=step)

    def write_samples(self, step: int, samples: Sequence[SampleRow]) -> None:
        """Nothing: samples.jsonl has every completion."""

    def close(self) -> None:
        """Hand over what is left."""
        with redirect_stdout(sys.stderr):
            self._run.finish()

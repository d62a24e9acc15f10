"""TrackioRun: a sink for trackio, which keeps runs in an SQLite file for `trackio show`."""

import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from importlib import import_module
from typing import Any

from textpolicy.tracking.sink import SampleRow
from textpolicy.tracking.values import to_json_number
from textpolicy.types import Metrics

_OPTIONS = {"resume": "allow", "embed": False, "auto_log_gpu": False, "auto_log_cpu": False}


class TrackioRun:
    """Logs to `project` under `name`. A run of this name is resumed."""

    def __init__(self, project: str, *, name: str, config: Mapping[str, Any]) -> None:
        trackio: Any = import_module("trackio")
        # trackio prints messages, but standard output is for the command's answer.
        with redirect_stdout(sys.stderr):
            self._run = trackio.init(project=project, name=name, config=dict(config), **_OPTIONS)

    def write(self, step: int, metrics: Metrics) -> None:
        """Log `metrics` at `step`."""
        self._run.log({name: to_json_number(value) for name, value in metrics.items()}, step=step)

    def write_samples(self, step: int, samples: Sequence[SampleRow]) -> None:
        """Log nothing. The samples are in samples.jsonl."""

    def close(self) -> None:
        """Write what is left and finish the run."""
        with redirect_stdout(sys.stderr):
            self._run.finish()

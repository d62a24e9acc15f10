"""What the files of a run say: its settings, its steps, and its scores on held-out data."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from textpolicy.cli.typed_flags import short_path
from textpolicy.runs import RunDirectory
from textpolicy.tracking.jsonl import read_metrics
from textpolicy.untrusted.terminal import shorten_line

# A system message may have many lines.
_LONGEST = 60


@dataclass(frozen=True)
class Measure:
    """What held-out data measures in a run: the keys in its metrics, and which value is best."""

    name: str
    key: str
    error_key: str | None
    best: Callable[..., float | None]


HELD_OUT_REWARD = Measure("held-out reward", "eval/reward", "eval/standard_error", max)
VALIDATION_LOSS = Measure("validation loss", "validation/loss", None, min)


@dataclass(frozen=True)
class Value:
    """A measured value and its standard error, which is None if the run has recorded none."""

    value: float
    standard_error: float | None = None

    def __str__(self) -> str:
        if self.standard_error is None:
            return f"{self.value:.4g}"
        return f"{self.value:.3f} ± {self.standard_error:.3f}"


@dataclass(frozen=True)
class RecordedRun:
    """A run as its config and its metrics say. `settings` has keys such as "run.steps"."""

    directory: RunDirectory
    settings: Mapping[str, Any]
    rows: Sequence[Mapping[str, float]]

    @classmethod
    def of(cls, directory: RunDirectory) -> "RecordedRun":
        """Read the files of a run. Raise `DataError` if one of them cannot be read."""
        settings = {
            f"{section}.{name}": value
            for section, found in directory.read_settings().items()
            for name, value in found.items()
        }
        rows = read_metrics(directory.metrics) if directory.metrics.is_file() else []
        return cls(directory, settings, rows)

    @property
    def name(self) -> str:
        return self.directory.path.name

    @property
    def is_supervised(self) -> bool:
        return "data.source" in self.settings

    @property
    def measure(self) -> Measure:
        """What the run measures on held-out data."""
        return VALIDATION_LOSS if self.is_supervised else HELD_OUT_REWARD

    @property
    def steps(self) -> int:
        """How many steps are done."""
        return max((int(row["step"]) + ("reward" in row) for row in self.rows), default=0)

    @property
    def planned(self) -> int:
        """How many steps the run is to have, or 0 if that is not known."""
        return self.settings.get("trainer.iterations" if self.is_supervised else "run.steps", 0)

    @property
    def state(self) -> Literal["running", "finished", "stopped"]:
        if self.directory.is_running:
            return "running"
        return "finished" if self.steps >= self.planned else "stopped"

    @property
    def task(self) -> str:
        """The environment or the rows that the run trains on, as a person would type them."""
        keys = ("task.env", "task.data", "data.source")
        return shown_setting(
            next((found for key in keys if (found := self.settings.get(key))), "-")
        )

    @property
    def algorithm(self) -> str:
        return "sft" if self.is_supervised else str(self.settings.get("algorithm.name"))

    def measured(self) -> list[Value]:
        """Return the values of the run's measure, in the order of their steps."""
        key, error = self.measure.key, self.measure.error_key
        return [
            Value(row[key], row.get(error) if error else None) for row in self.rows if key in row
        ]

    def best(self) -> Value | None:
        """Return the best value of the run's measure, or None if nothing was measured."""
        values = self.measured()
        best = self.measure.best([one.value for one in values], default=None)
        return next((one for one in values if one.value == best), None)


def shown_setting(value: Any) -> str:
    """Return the value of a setting as a person would type it, with short paths."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return ",".join(map(shown_setting, value))
    if isinstance(value, float):
        return f"{value:g}"
    path, separator, name = str(value).partition(":")
    if path.startswith("/"):
        return short_path(Path(path)) + separator + name
    return shorten_line(str(value), _LONGEST)

"""What the files of a run say about it, for a model card. What they do not say is left out."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from textpolicy.errors import TrainingError
from textpolicy.experiment.resuming import RUN
from textpolicy.runs import RunDirectory
from textpolicy.tracking.jsonl import read_metrics
from textpolicy.tracking.named_numbers import NamedNumber, named_numbers
from textpolicy.training.checkpoint import Checkpoints

_DATASET = re.compile(r"hf:([\w.-]{1,96}(?:/[\w.-]{1,96})?)(?![\w./-])", re.ASCII)
# Larger numbers cannot be drawn.
_LARGEST = 1e300
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class HeldOutScore:
    """A measurement on held-out data, of the adapter of `version`."""

    value: float
    standard_error: float | None
    version: int
    numbers: Sequence[NamedNumber] = ()
    """What the rewards gave beside their sum, on the same data."""

    def __str__(self) -> str:
        if self.standard_error is None:
            return f"{self.value:.4f}"
        return f"{self.value:.3f} ± {self.standard_error:.3f}"


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """One run: `settings` by section as in its config, curves by metric, and what it measured.

    `before` is the measurement before the first step, and `after` one of a later adapter.
    """

    supervised: bool
    settings: Mapping[str, Mapping[str, Any]]
    steps: int
    curves: Mapping[str, Points]
    before: HeldOutScore | None
    after: HeldOutScore | None
    alarms: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=dict[str, str])

    def setting(self, key: str) -> Any:
        """Return the value of a setting such as "run.seed", or None."""
        section, _, name = key.partition(".")
        return self.settings.get(section, {}).get(name)

    @property
    def dataset(self) -> str | None:
        """The id of the dataset on the hub that the run trained on, or None."""
        match = _DATASET.match(str(self.setting("data.source") or self.setting("task.data") or ""))
        return match[1] if match else None


def read_run_facts(directory: RunDirectory, version: int) -> RunFacts:
    """Return the facts of a run. Its score `after` is that of the adapter `version`, if measured.

    Otherwise the score is the last one, which names the version that it is of.
    """
    settings = directory.read_settings()
    supervised = "data" in settings
    rows = read_metrics(directory.metrics)
    main, held_out = ("loss", "validation/loss") if supervised else ("reward", "eval/reward")
    scores = _scores(rows, held_out)
    before = scores.pop(0) if scores and rows[0]["step"] == 0 and held_out in rows[0] else None
    measured = [before, *scores] if before else scores
    fitting = [score for score in measured if score.version == version]
    return RunFacts(
        supervised=supervised,
        settings=settings,
        steps=max((int(row["step"]) + (not supervised) for row in rows if main in row), default=0),
        curves={name: curve for name in (main, held_out) if (curve := _curve(rows, name))},
        before=before,
        after=(fitting or scores or [None])[-1],
        alarms=_alarms(rows),
        versions=_versions(directory),
    )


def public_name(value: Any) -> str:
    """Return the name of a file or folder without its folder, and any other name as it is."""
    text = str(value)
    is_path = Path(text).is_absolute() or text.startswith((".", "~"))
    return Path(text).name if is_path or os.path.exists(text) else text


def _scores(rows: Sequence[Mapping[str, float]], name: str) -> list[HeldOutScore]:
    """Return the measurements in the order of the rows."""
    scores: list[HeldOutScore] = []
    version = 0.0
    for row in rows:
        if "reward" not in row:
            # The row after the last step, and every row of supervised training, has no step.
            version = row.get("version", row["step"])
        if _is_number(row.get(name)):
            error = row.get("eval/standard_error")
            scores.append(
                HeldOutScore(
                    value=row[name],
                    standard_error=error if _is_number(error) else None,
                    version=int(version),
                    numbers=[one for one in named_numbers(row, "eval/") if _is_number(one.value)],
                )
            )
        # The row of a step has the measurement before the step, and the version after it.
        version = row.get("version", version)
    return scores


def _is_number(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value) and abs(value) <= _LARGEST


def _curve(rows: Sequence[Mapping[str, float]], name: str) -> Points:
    return [(row["step"], row[name]) for row in rows if _is_number(row.get(name))]


def _alarms(rows: Sequence[Mapping[str, float]]) -> list[str]:
    """Return the alarms of the run, each with the first step at which it was present."""
    first: dict[str, float] = {}
    for row in rows:
        for name in row:
            if name.startswith("alarm/") and row[name] > 0:
                first.setdefault(name.removeprefix("alarm/"), row["step"])
    return [f"{name} at step {step:.0f}" for name, step in first.items()]


def _versions(directory: RunDirectory) -> dict[str, str]:
    """Return the versions of the packages that the run computed with, from its last checkpoint."""
    try:
        newest = Checkpoints(directory.checkpoints).newest()
    except TrainingError:
        return {}
    found = newest.facts.get(RUN, {}).get("versions", {}) if newest else {}
    return {name: version for name, version in found.items() if version}

"""What a page shows of a run: its curves, its settings, its numbers in short."""

import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from textpolicy.errors import DataError
from textpolicy.runs import RunDirectory
from textpolicy.tracking.jsonl import read_metrics
from textpolicy.tracking.report.charts import STACKED_METRICS
from textpolicy.tracking.report.samples import choose_samples

# A chart is some hundreds of pixels wide.
_MAX_POINTS = 400
_DIGITS = 5

_Rows = Sequence[Mapping[str, float]]
_Points = list[tuple[float, float]]


def read_run(path: Path, *, sample_bytes: int) -> dict[str, Any]:
    """Everything that the page knows of the run in `path`."""
    directory = RunDirectory(path)
    if not directory.metrics.is_file():
        raise DataError(
            f"{path} holds no {directory.metrics.name}: expected the directory of a run, such as "
            "runs/add; `textpolicy runs` lists them"
        )
    rows = read_metrics(directory.metrics)
    config = _config(directory.config)
    samples, total = choose_samples(directory.samples, sample_bytes)
    names = dict.fromkeys(name for row in rows for name in row if name != "step")
    return {
        "name": path.resolve().name,
        "config": config,
        "facts": [*_settings(config), *_facts(rows)],
        "metrics": {name: _thinned(_drawn(rows, name)) for name in names},
        "samples": samples,
        "samples_total": total,
    }


def _drawn(rows: _Rows, name: str) -> _Points:
    if name not in STACKED_METRICS:
        return _points(rows, name)
    # What a step did not do took no time in it.
    return [(row["step"], row.get(name, 0.0)) for row in rows if "time/step" in row]


def _points(rows: _Rows, name: str) -> _Points:
    return [(row["step"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]


def _thinned(points: _Points) -> _Points:
    """At most `_MAX_POINTS` points: the means of as many stretches, where there are more."""
    size = max(1, math.ceil(len(points) / _MAX_POINTS))
    stretches = [points[start : start + size] for start in range(0, len(points), size)]
    return [
        (stretch[len(stretch) // 2][0], _rounded(sum(value for _, value in stretch) / len(stretch)))
        for stretch in stretches
    ]


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def _config(path: Path) -> dict[str, dict[str, str]]:
    """Settings by section, in words; nothing, where the run was begun without the command."""
    if not path.is_file():
        return {}
    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not TOML: {error}") from error
    return {
        section: {name: f"{value}" for name, value in settings.items()}
        for section, settings in content.items()
        if isinstance(settings, dict) and settings
    }


def _facts(rows: _Rows) -> list[tuple[str, str]]:
    """The run in a few numbers, as far as it has them."""
    # A row without the time of a step is of its end: an evaluation, a report of several updates.
    done = max((row["step"] + ("time/step" in row) for row in rows), default=0)
    facts = [("steps", f"{done:,.0f}")]
    for name, title in _COURSES.items():
        if (points := _points(rows, name)) and not (name == "loss" and "reward" in rows[0]):
            facts.append((title, _course([value for _, value in points])))
    for name, (title, pattern) in _TOTALS.items():
        if points := _points(rows, name):
            facts.append((title, pattern.format(sum(value for _, value in points))))
    fired = [(row["step"], name) for row in rows for name in row if _fires(row, name)]
    first = {name: step for step, name in reversed(fired)}
    facts += [(name.replace("/", ": "), f"at step {step:g}") for name, step in first.items()]
    return facts


def _course(values: Sequence[float]) -> str:
    """From the mean of the first tenth to that of the last: single steps are noise."""
    count = max(1, len(values) // 10)
    return f"{fmean(values[:count]):.3g} → {fmean(values[-count:]):.3g}"


def _settings(config: Mapping[str, Mapping[str, str]]) -> list[tuple[str, str]]:
    """What was done, in a few words."""
    found = [(title, config.get(s, {}).get(name)) for title, s, name in _TITLES]
    return [(title, value) for title, value in found if value]


def _fires(row: Mapping[str, float], name: str) -> bool:
    return name.startswith("alarm/") and row[name] > 0


_TITLES = [
    *[("task", "task", "env"), ("data", "task", "data"), ("data", "data", "source")],
    *[("algorithm", "algorithm", "name"), ("model", "model", "name")],
]
_COURSES = {
    "reward": "reward",
    "eval/reward": "greedy, held out",
    "validation/loss": "validation loss",
    "loss": "loss",
    "completions/mean_length": "length",
    "entropy": "entropy",
}
_TOTALS = {
    "num_tokens": ("tokens sampled", "{:,.0f}"),
    "time/step": ("seconds in steps", "{:,.1f}"),
}

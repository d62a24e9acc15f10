"""Read a run for the report: its curves, settings, samples and main numbers."""

import math
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

_Rows = Sequence[Mapping[str, float]]
_Points = list[tuple[float, float]]
_SETTINGS = [
    *[("task", "task", "env"), ("data", "task", "data"), ("data", "data", "source")],
    *[("algorithm", "algorithm", "name"), ("model", "model", "name")],
]
_CHANGES = {
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


def read_run(path: Path, *, sample_bytes: int) -> dict[str, Any]:
    """Return the report's data of the run in `path`, with about `sample_bytes` of samples."""
    directory = RunDirectory(path)
    if not directory.metrics.is_file():
        raise DataError(
            f"{path} has no {directory.metrics.name}; expected the directory of a run, such as "
            "runs/add. `textpolicy runs` lists the runs"
        )
    rows = read_metrics(directory.metrics)
    # A run that was not started by the command has no config.
    settings = directory.read_settings() if directory.config.is_file() else {}
    config = {
        section: {name: f"{value}" for name, value in values.items()}
        for section, values in settings.items()
        if values
    }
    samples, total = choose_samples(directory.samples, sample_bytes)
    names = dict.fromkeys(name for row in rows for name in row if name != "step")
    return {
        "name": path.resolve().name,
        "config": config,
        "facts": [*_main_settings(config), *_main_numbers(rows)],
        "metrics": {name: _thin_out(_drawn_points(rows, name)) for name in names},
        "samples": samples,
        "samples_total": total,
    }


def _drawn_points(rows: _Rows, name: str) -> _Points:
    if name not in STACKED_METRICS:
        return _points(rows, name)
    # A step that did not do this took no time for it.
    return [(row["step"], row.get(name, 0.0)) for row in rows if "time/step" in row]


def _points(rows: _Rows, name: str) -> _Points:
    return [(row["step"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]


def _thin_out(points: _Points) -> _Points:
    """Return at most `_MAX_POINTS` points, each the mean of several points if there are more."""
    size = max(1, math.ceil(len(points) / _MAX_POINTS))
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [
        (part[len(part) // 2][0], float(f"{sum(value for _, value in part) / len(part):.5g}"))
        for part in parts
    ]


def _main_settings(config: Mapping[str, Mapping[str, str]]) -> list[tuple[str, str]]:
    found = [(title, config.get(section, {}).get(name)) for title, section, name in _SETTINGS]
    return [(title, value) for title, value in found if value]


def _main_numbers(rows: _Rows) -> list[tuple[str, str]]:
    """Return steps, changes, totals and alarms of a run as pairs of title and value."""
    # A row without the time of a step comes after the last step, as a last evaluation does.
    done = max((row["step"] + ("time/step" in row) for row in rows), default=0)
    numbers = [("steps", f"{done:,.0f}")]
    for name, title in _CHANGES.items():
        if (points := _points(rows, name)) and not (name == "loss" and "reward" in rows[0]):
            numbers.append((title, _change([value for _, value in points])))
    for name, (title, pattern) in _TOTALS.items():
        if points := _points(rows, name):
            numbers.append((title, pattern.format(sum(value for _, value in points))))
    first: dict[str, float] = {}
    for row in rows:
        for name in row:
            if name.startswith("alarm/") and row[name] > 0:
                first.setdefault(name, row["step"])
    numbers += [(name.replace("/", ": "), f"at step {step:g}") for name, step in first.items()]
    return numbers


def _change(values: Sequence[float]) -> str:
    """Return the mean of the first and of the last tenth, because single steps are noise."""
    count = max(1, len(values) // 10)
    return f"{fmean(values[:count]):.3g} → {fmean(values[-count:]):.3g}"

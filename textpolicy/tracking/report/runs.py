"""Read a run for the report: its curves, settings, samples and main numbers."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from statistics import fmean
from typing import Any

from textpolicy.errors import DataError
from textpolicy.runs import RunDirectory
from textpolicy.tracking.doubts import find_doubts
from textpolicy.tracking.jsonl import read_metrics, read_rows
from textpolicy.tracking.report.charts import STACKED_METRICS

# A chart is some hundreds of pixels wide.
_MAX_POINTS = 400
_MAX_SAMPLE_STEPS = 60
# Sums of larger numbers can be infinite, which the page cannot hold.
_LARGEST = 1e300
MAX_TEXT_CHARACTERS = 6000

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
    main = [(title, config.get(section, {}).get(name)) for title, section, name in _SETTINGS]
    return {
        "name": path.resolve().name,
        "config": config,
        "facts": [*((title, value) for title, value in main if value), *_main_numbers(rows)],
        "metrics": {name: _curve(rows, name) for name in names},
        "samples": samples,
        "samples_total": total,
    }


def _points(rows: _Rows, name: str, absent: float = math.nan) -> _Points:
    values = ((row["step"], row.get(name, absent)) for row in rows)
    return [(step, value) for step, value in values if abs(value) <= _LARGEST]


def _curve(rows: _Rows, name: str) -> _Points:
    """Return at most `_MAX_POINTS` points, each the mean of several points if there are more."""
    points = _points(rows, name)
    if name in STACKED_METRICS:
        # A step that did not do this took no time for it.
        points = _points([row for row in rows if "time/step" in row], name, absent=0.0)
    size = max(1, math.ceil(len(points) / _MAX_POINTS))
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [
        (part[len(part) // 2][0], float(f"{sum(value for _, value in part) / len(part):.5g}"))
        for part in parts
    ]


def _main_numbers(rows: _Rows) -> list[tuple[str, str]]:
    """Return steps, changes, totals, doubts and alarms of a run as pairs of title and value."""
    # A row without the time of a step comes after the last step, as a last evaluation does.
    done = max((row["step"] + ("time/step" in row) for row in rows), default=0)
    numbers = [("steps", f"{done:,.0f}")]
    for name, title in _CHANGES.items():
        if (points := _points(rows, name)) and not (name == "loss" and "reward" in rows[0]):
            # The mean of the first and of the last tenth, because single steps are noise.
            tenth = max(1, len(points) // 10)
            first, last = (fmean(v for _, v in part) for part in (points[:tenth], points[-tenth:]))
            numbers.append((title, f"{first:.3g} → {last:.3g}"))
    for name, (title, pattern) in _TOTALS.items():
        if points := _points(rows, name):
            numbers.append((title, pattern.format(sum(value for _, value in points))))
    numbers += _waiting(rows)
    alarms: dict[str, float] = {}
    for row in rows:
        for name in row:
            if name.startswith("alarm/") and row[name] > 0:
                alarms.setdefault(name, row["step"])
    numbers += [("doubt", doubt) for doubt in find_doubts(rows)]
    numbers += [(name.replace("/", ": "), f"at step {step:g}") for name, step in alarms.items()]
    return numbers


def _waiting(rows: _Rows) -> list[tuple[str, str]]:
    """Return how long trainer and workers waited for each other, if the run had workers.

    Workers start in the first step, which is not counted if there are others.
    """
    rows = [row for row in rows if "workers/idle" in row]
    rows = rows[1:] or rows
    idle = [value for _, value in _points(rows, "workers/idle")]
    if not idle:
        return []
    waited, steps = (
        sum(value for _, value in _points(rows, name)) for name in ("time/wait", "time/step")
    )
    share = f"trainer {waited / steps:.0%}, workers {fmean(idle):.0%} of the time"
    dropped = sum(value for _, value in _points(rows, "buffer/dropped"))
    given_up = sum(value for _, value in _points(rows, "workers/given_up"))
    ended = sum(value for _, value in _points(rows, "workers/ended"))
    counts = {
        "groups dropped as too stale": dropped,
        "workers that died or hung": ended,
        "tasks given up": given_up,
    }
    return [
        ("waited for the other", share),
        *((title, f"{count:,.0f}") for title, count in counts.items() if count),
    ]


def choose_samples(path: Path, limit: int) -> tuple[list[dict[str, Any]], int]:
    """Return samples of at most about `limit` bytes of JSON in order, and their number in the file.

    Samples are whole groups, spread over the run. The first group of every chosen step is taken
    before the second group of any step.
    """
    total, sizes = 0, Counter[tuple[int, int]]()
    for row in read_rows(path):
        total += 1
        sizes[_key(row)] += len(json.dumps(_cut(row)))
    steps = sorted({step for step, _ in sizes})
    count = min(_MAX_SAMPLE_STEPS, len(steps))
    # Evenly spread, with the first and the last step among them.
    places = {round(i * (len(steps) - 1) / max(1, count - 1)) for i in range(count)}
    by_step = [[key for key in sizes if key[0] == steps[place]] for place in sorted(places)]
    left, chosen = limit, set[tuple[int, int]]()
    for keys in zip_longest(*by_step):
        for key in filter(None, keys):
            if sizes[key] <= left:
                left -= sizes[key]
                chosen.add(key)
    return [_cut(row) for row in read_rows(path) if _key(row) in chosen], total


def _key(row: Mapping[str, Any]) -> tuple[int, int]:
    group = row.get("group", 0)
    # Somebody may have edited the file.
    return row["step"], group if isinstance(group, int) else 0


def _cut(value: Any) -> Any:
    """Return the value with long texts cut, each with a note of how many characters are cut."""
    if isinstance(value, str) and len(value) > MAX_TEXT_CHARACTERS:
        more = len(value) - MAX_TEXT_CHARACTERS
        return f"{value[:MAX_TEXT_CHARACTERS]}\n[{more:,} characters more in samples.jsonl]"
    if isinstance(value, dict):
        return {name: _cut(part) for name, part in value.items()}
    return [_cut(part) for part in value] if isinstance(value, list) else value

"""`textpolicy runs`: what runs there are and how far they came, or where several of them differ."""

import tomllib
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from textpolicy.cli.answer import Report
from textpolicy.errors import ConfigError, DataError
from textpolicy.runs import RunDirectory
from textpolicy.tracking.console import terminal_safe
from textpolicy.tracking.jsonl import read_metrics

# Of the numbers of a run, those that are compared beside its evaluations.
_COMPARED = ("reward", "loss", "validation/loss", "entropy", "completions/mean_length", "time/step")


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """One run as its files tell it. `best` is of evaluations: rewards, or validation losses."""

    name: str
    task: str
    algorithm: str
    steps: int
    planned: int
    best: float | None
    state: Literal["running", "finished", "stopped", "unreadable"]


def run(options: Namespace) -> Report:
    paths: Sequence[Path] = options.paths or [Path("runs")]
    found = [directory for path in paths for directory in _runs_in(path)]
    if len(paths) > 1 and all(RunDirectory(path).exists for path in paths):
        return _compare(found)
    summaries = [
        _summary(directory) if directory.path in paths else _among_others(directory)
        for directory in found
    ]
    if not summaries:
        return Report(data={"runs": []}, text=f"no runs in {', '.join(map(str, paths))}")
    return Report(data={"runs": [asdict(one) for one in summaries]}, text=_listed(summaries))


def _runs_in(path: Path) -> list[RunDirectory]:
    """The run that a folder is, or the runs that are in it."""
    if RunDirectory(path).exists:
        return [RunDirectory(path)]
    if not path.is_dir():
        raise ConfigError(f"{path} is no folder: name a run, or a folder of runs")
    inside = [RunDirectory(folder) for folder in sorted(path.iterdir()) if folder.is_dir()]
    return [directory for directory in inside if directory.exists]


def _config(directory: RunDirectory) -> dict[str, Any]:
    """Settings by key, as they stand in the file: a run of another version can be read too."""
    try:
        content = tomllib.loads(directory.config.read_text("utf-8"))
    except ValueError as error:
        raise DataError(f"{directory.config} is not TOML: {error}") from error
    return {
        f"{section}.{name}": value
        for section, settings in content.items()
        if isinstance(settings, dict)
        for name, value in settings.items()
    }


def _rows(directory: RunDirectory) -> list[dict[str, Any]]:
    return read_metrics(directory.metrics) if directory.metrics.is_file() else []


def _among_others(directory: RunDirectory) -> RunSummary:
    """One that cannot be read hides no other; named by itself it is told why."""
    try:
        return _summary(directory)
    except DataError:
        return RunSummary(
            name=directory.path.name,
            task="-",
            algorithm="-",
            steps=0,
            planned=0,
            best=None,
            state="unreadable",
        )


def _summary(directory: RunDirectory) -> RunSummary:
    config, rows = _config(directory), _rows(directory)
    supervised = "data.source" in config
    planned = config.get("trainer.iterations", 0) if supervised else config.get("run.steps", 0)
    done = max((row["step"] + ("reward" in row) for row in rows), default=0)
    evaluated = _values(rows, "validation/loss" if supervised else "eval/reward")
    state = "running" if directory.is_running else "finished" if done >= planned else "stopped"
    return RunSummary(
        name=directory.path.name,
        task=str(config.get("task.env") or config.get("task.data") or config.get("data.source")),
        algorithm="sft" if supervised else str(config.get("algorithm.name")),
        steps=done,
        planned=planned,
        best=(min if supervised else max)(evaluated) if evaluated else None,
        state=state,
    )


def _values(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [row[name] for row in rows if name in row]


def _listed(summaries: Sequence[RunSummary]) -> str:
    head = ("run", "task", "algorithm", "steps", "best", "state")
    cells = [
        (
            one.name,
            one.task,
            one.algorithm,
            f"{one.steps}/{one.planned}" if one.planned else f"{one.steps}",
            "-" if one.best is None else f"{one.best:.3f}",
            one.state,
        )
        for one in summaries
    ]
    return _columns([head, *cells])


def _compare(directories: Sequence[RunDirectory]) -> Report:
    names = [directory.path.name for directory in directories]
    config = _differing([_config(directory) for directory in directories])
    config.pop("run.output", None)
    metrics = _differing([_final(_rows(directory)) for directory in directories])
    rows = [
        (key, *(_shown(value) for value in values)) for key, values in (config | metrics).items()
    ]
    data = {"runs": [str(directory.path) for directory in directories]}
    text = _columns([("", *names), *rows]) if rows else "these runs do not differ"
    return Report(data=data | {"config": config, "metrics": metrics}, text=text)


def _final(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The last value of each number worth comparing, and the best evaluation."""
    last: dict[str, Any] = {}
    for row in rows:
        last |= {k: v for k, v in row.items() if k.startswith("eval/") or k in _COMPARED}
    best = {"best eval/reward": max(rewards)} if (rewards := _values(rows, "eval/reward")) else {}
    return last | best


def _differing(mappings: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    keys = dict.fromkeys(key for mapping in mappings for key in mapping)
    values = {key: [mapping.get(key) for mapping in mappings] for key in keys}
    return {key: found for key, found in values.items() if any(one != found[0] for one in found)}


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _columns(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return terminal_safe("\n".join(lines))

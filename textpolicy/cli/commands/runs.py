"""`textpolicy runs`: list runs and how far they got, or compare several of them."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from textpolicy.cli.answer import Answer
from textpolicy.errors import ConfigError, DataError
from textpolicy.runs import RunDirectory
from textpolicy.tracking.jsonl import read_metrics

# Names, words, and which one is the best.
_SCORES = (
    ("eval/reward", "held-out reward", max),
    ("validation/loss", "validation loss", min),
)
_NAMED_SCORE = "eval/rewards/"
# The metrics that a comparison shows beside those of evaluations.
_COMPARED = ("reward", "loss", "validation/loss", "entropy", "completions/mean_length", "time/step")


@dataclass(frozen=True)
class RunSummary:
    """One run, read from its files. `best` is its best evaluation reward or validation loss."""

    name: str
    task: str
    algorithm: str
    steps: int
    planned: int
    best: float | None
    state: Literal["running", "finished", "stopped", "unreadable"]


def run(options: Namespace) -> Answer:
    paths: Sequence[Path] = options.paths or [Path("runs")]
    directories = [directory for path in paths for directory in _runs_in(path)]
    if len(paths) > 1 and all(RunDirectory(path).exists for path in paths):
        return _compare(directories)
    named = [path.absolute() for path in paths]
    summaries = [_summary(directory, named=directory.path in named) for directory in directories]
    if not summaries:
        return Answer(data={"runs": []}, text=f"no runs in {', '.join(map(str, paths))}")
    return Answer(data={"runs": [asdict(one) for one in summaries]}, text=_table(summaries))


def _runs_in(path: Path) -> list[RunDirectory]:
    """Return the run that the folder is, or the runs inside the folder."""
    if RunDirectory(path).exists:
        return [RunDirectory(path)]
    if not path.is_dir():
        raise ConfigError(f"{path} is not a folder. Name a run, or a folder of runs")
    inside = [RunDirectory(folder) for folder in sorted(path.iterdir()) if folder.is_dir()]
    return [directory for directory in inside if directory.exists]


def _settings(directory: RunDirectory) -> dict[str, Any]:
    """Return the settings by key, such as "run.steps"."""
    return {
        f"{section}.{name}": value
        for section, settings in directory.read_settings().items()
        for name, value in settings.items()
    }


def _rows(directory: RunDirectory) -> list[dict[str, Any]]:
    return read_metrics(directory.metrics) if directory.metrics.is_file() else []


def _summary(directory: RunDirectory, *, named: bool) -> RunSummary:
    """Return the summary of a run; a damaged run that was not named must not hide the others."""
    try:
        settings, rows = _settings(directory), _rows(directory)
    except DataError:
        if named:
            raise
        return RunSummary(directory.path.name, "-", "-", 0, 0, None, "unreadable")
    supervised = "data.source" in settings
    planned = settings.get("trainer.iterations" if supervised else "run.steps", 0)
    done = max((row["step"] + ("reward" in row) for row in rows), default=0)
    evaluated = _values(rows, "validation/loss" if supervised else "eval/reward")
    state = "running" if directory.is_running else "finished" if done >= planned else "stopped"
    task = settings.get("task.env") or settings.get("task.data") or settings.get("data.source")
    return RunSummary(
        name=directory.path.name,
        task=str(task),
        algorithm="sft" if supervised else str(settings.get("algorithm.name")),
        steps=done,
        planned=planned,
        best=(min if supervised else max)(evaluated) if evaluated else None,
        state=state,
    )


def _values(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [row[name] for row in rows if name in row]


def _table(summaries: Sequence[RunSummary]) -> str:
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


def _compare(directories: Sequence[RunDirectory]) -> Answer:
    """Answer the scores of runs, then the settings and numbers that differ between the runs."""
    summaries = [_summary(directory, named=True) for directory in directories]
    all_rows = [_rows(directory) for directory in directories]
    # A setting of one kind of run only says nothing about the other kind.
    mixed = len({one.algorithm == "sft" for one in summaries}) > 1
    settings = _differing([_settings(directory) for directory in directories], shared=mixed)
    settings.pop("run.output", None)
    metrics = _differing([_final_metrics(rows) for rows in all_rows])
    scores = _by_key([_scores(rows) for rows in all_rows])
    scores |= {"steps": [f"{one.steps}/{one.planned}" for one in summaries]}
    others = {name: found for name, found in metrics.items() if "eval/" not in name}
    names = [one.name for one in summaries]
    table = [("", *names), *_cells(scores)]
    for title, found in (("settings that differ:", settings), ("last numbers:", others)):
        if found:
            empty = [""] * len(names)
            table += [("", *empty), (title, *empty), *_cells(found)]
    text = _columns(table) if settings or metrics else "these runs do not differ"
    data = {"runs": [str(directory.path) for directory in directories]}
    data |= {"scores": scores, "config": settings, "metrics": metrics}
    return Answer(data=data, text=text)


def _scores(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the first, the last and the best score on held-out data, and other last scores."""
    scores: dict[str, float] = {}
    for name, about, best in _SCORES:
        if values := _values(rows, name):
            first, last = values[0], values[-1]
            scores |= {f"{about}, first": first, f"{about}, last": last}
            scores[f"{about}, best"] = best(values)
    named = [row for row in rows if any(key.startswith(_NAMED_SCORE) for key in row)]
    last_row = named[-1] if named else {}
    return scores | {k: v for k, v in last_row.items() if k.startswith(_NAMED_SCORE)}


def _cells(values: Mapping[str, Sequence[Any]]) -> list[tuple[str, ...]]:
    return [(key, *map(_to_text, found)) for key, found in values.items()]


def _final_metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the last value of each compared metric, and the best evaluation reward."""
    last: dict[str, Any] = {}
    for row in rows:
        last |= {k: v for k, v in row.items() if k.startswith("eval/") or k in _COMPARED}
    best = {"best eval/reward": max(rewards)} if (rewards := _values(rows, "eval/reward")) else {}
    return last | best


def _differing(
    mappings: Sequence[Mapping[str, Any]], *, shared: bool = False
) -> dict[str, list[Any]]:
    """Return the keys whose values differ; if `shared`, only those that every mapping has."""
    return {
        key: found
        for key, found in _by_key(mappings).items()
        if any(one != found[0] for one in found) and not (shared and None in found)
    }


def _by_key(mappings: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return every key with its value in each mapping, or None where a mapping has none."""
    keys = dict.fromkeys(key for mapping in mappings for key in mapping)
    return {key: [mapping.get(key) for mapping in mappings] for key in keys}


def _to_text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _columns(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join(lines)

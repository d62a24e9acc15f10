"""`textpolicy runs`: list runs and how far they got, or compare several of them."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from textpolicy.cli.answer import Answer
from textpolicy.cli.compared_runs import (
    by_key,
    differing_numbers,
    differing_settings,
    lines_of_settings,
    scores_of,
    why_not_comparable,
)
from textpolicy.cli.recorded_runs import RecordedRun, shown_setting
from textpolicy.errors import ConfigError, DataError
from textpolicy.runs import RunDirectory


@dataclass(frozen=True)
class RunSummary:
    """One run, read from its files. `best` is its best value of `measure` on held-out data."""

    name: str
    task: str
    algorithm: str
    steps: int
    planned: int
    best: float | None
    standard_error: float | None
    measure: str
    state: Literal["running", "finished", "stopped", "unreadable"]


def run(options: Namespace) -> Answer:
    paths: Sequence[Path] = options.paths or [Path("runs")]
    directories = [directory for path in paths for directory in _runs_in(path)]
    if len(paths) > 1 and all(RunDirectory(path).exists for path in paths):
        return _compare(list(map(RecordedRun.of, directories)))
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


def _summary(directory: RunDirectory, *, named: bool) -> RunSummary:
    """Return the summary of a run; a damaged run that was not named must not hide the others."""
    try:
        run = RecordedRun.of(directory)
    except DataError:
        if named:
            raise
        return RunSummary(directory.path.name, "-", "-", 0, 0, None, None, "-", "unreadable")
    best = run.best()
    return RunSummary(
        name=run.name,
        task=run.task,
        algorithm=run.algorithm,
        steps=run.steps,
        planned=run.planned,
        best=best.value if best else None,
        standard_error=best.standard_error if best else None,
        measure=_measure(run) if best else "-",
        state=run.state,
    )


def _measure(run: RecordedRun) -> str:
    """Return what the best value is of. Values of different rewards cannot be compared."""
    reward = None if run.is_supervised else run.settings.get("task.reward")
    return run.measure.name + (f" of {shown_setting(reward)}" if reward else "")


def _table(summaries: Sequence[RunSummary]) -> str:
    head = ("run", "task", "algorithm", "steps", "best", "measure", "state")
    cells = [
        (
            one.name,
            one.task,
            one.algorithm,
            f"{one.steps}/{one.planned}" if one.planned else f"{one.steps}",
            _best(one),
            one.measure,
            one.state,
        )
        for one in summaries
    ]
    return _columns([head, *cells])


def _best(summary: RunSummary) -> str:
    if summary.best is None:
        return "-"
    error = summary.standard_error
    return f"{summary.best:.3f}" + ("" if error is None else f" ± {error:.3f}")


def _compare(runs: Sequence[RecordedRun]) -> Answer:
    """Answer the scores of runs, then the settings and numbers that differ between the runs."""
    scores = by_key([scores_of(run) for run in runs])
    settings = differing_settings(runs)
    numbers = differing_numbers(runs)
    warning = why_not_comparable(runs)
    steps = [f"{run.steps}/{run.planned}" for run in runs]
    shown_settings, note = lines_of_settings(runs, settings)
    empty = ("",) * len(runs)
    table = [("", *(run.name for run in runs)), *_cells(scores), ("steps", *steps)]
    for title, rows in (
        ("settings that differ:", shown_settings),
        ("last numbers:", _cells(numbers)),
    ):
        table += [("", *empty), (title, *empty), *rows] if rows else []
    text = "\n".join(filter(None, [warning, _columns(table), note]))
    values = {name: [one and one.value for one in found] for name, found in scores.items()}
    errors = {name: [one and one.standard_error for one in found] for name, found in scores.items()}
    data = {
        "runs": [str(run.directory.path) for run in runs],
        "not_comparable": warning,
        "scores": values | {"steps": steps},
        "standard_errors": errors,
        "config": settings,
        "metrics": numbers,
    }
    return Answer(data=data, text=text if settings or numbers else "these runs do not differ")


def _cells(values: Mapping[str, Sequence[Any]]) -> list[tuple[str, ...]]:
    return [(key, *map(_to_text, found)) for key, found in values.items()]


def _to_text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _columns(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join(lines)

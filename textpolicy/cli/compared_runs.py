"""Runs side by side: whether their scores can be compared, the scores, and what else differs."""

from collections.abc import Mapping, Sequence
from typing import Any

from textpolicy.adapters.config.rules import LoRARule
from textpolicy.cli.recorded_runs import RecordedRun, Value, shown_setting
from textpolicy.config import SFTConfig, TrainConfig, settings_of
from textpolicy.tracking.named_numbers import shown_numbers

# What shapes a result most; other settings follow in the order of the config.
_FIRST = (
    *("data.source", "task.env", "task.data", "data.eval_data", "task.eval_data"),
    *("task.reward", "model.name", "adapter.start", "algorithm.name"),
    *("trainer.iterations", "trainer.epochs", "run.steps", "trainer.lr"),
    *("trainer.batch_size", "rollout.groups_per_step", "rollout.group_size"),
)
_RANK, _SCALE, _ALPHA = "adapter.rank", "adapter.scale", "adapter.alpha"
_LAST = ("run.", "tracking.")
# In the order in which people look at them.
_METRICS = ("reward", "completions/mean_length", "entropy", "loss", "time/step")
_NO_SUCH_SETTING = "—"


def why_not_comparable(runs: Sequence[RecordedRun]) -> str:
    """Return one sentence if the scores of the runs are of different things, or an empty text."""
    measures = {
        run.measure.name: [one.name for one in runs if one.measure is run.measure] for run in runs
    }
    reasons: list[str] = []
    if len(measures) > 1:
        parts = [f"the {name} of {', '.join(names)}" for name, names in measures.items()]
        reasons.append(f"{' and '.join(parts)} are different measures")
    rewarded = [run for run in runs if not run.is_supervised]
    for about, values in (
        ("rewards", [_reward_of(run) for run in rewarded]),
        ("held-out data", [_held_out_data_of(run) for run in (rewarded or runs)]),
        (
            "numbers of held-out tasks",
            [str(run.settings.get("evaluation.count")) for run in rewarded],
        ),
    ):
        if len(different := dict.fromkeys(values)) > 1:
            reasons.append(f"the {about} differ ({', '.join(different)})")
    if not reasons:
        return ""
    return f"These scores cannot be compared with each other: {', and '.join(reasons)}."


def _reward_of(run: RecordedRun) -> str:
    given = run.settings.get("task.reward")
    return shown_setting(given) if given else f"that of {run.task}"


def _held_out_data_of(run: RecordedRun) -> str:
    """Return the rows or the environment that the run measures on."""
    section = "data" if run.is_supervised else "task"
    rows = run.settings.get(f"{section}.eval_data")
    return shown_setting(rows) if rows else f"a part of {run.task}"


def scores_of(run: RecordedRun) -> dict[str, Value]:
    """Return the first, last and best score on held-out data, and the numbers of the reward."""
    scores: dict[str, Value] = {}
    if values := run.measured():
        ends = {"first": values[0], "last": values[-1], "best": run.best() or values[-1]}
        scores |= {f"{run.measure.name}, {when}": value for when, value in ends.items()}
    rows = [numbers for row in run.rows if (numbers := shown_numbers(row, "eval/"))]
    for number in rows[0] if rows else ():
        last = [one for one in rows[-1] if one.name == number.name] or [number]
        for when, one in (("first", number), ("last", last[0])):
            scores[f"held-out {number.name}, {when}"] = Value(one.value, one.standard_error)
    return scores


def _last_numbers(run: RecordedRun) -> dict[str, float]:
    """Return the last value of the metrics of steps that a comparison shows."""
    return {name: row[name] for row in run.rows for name in _METRICS if name in row}


def differing_numbers(runs: Sequence[RecordedRun]) -> dict[str, list[float | None]]:
    """Return the last numbers that differ, in the order in which people look at them."""
    found = _differing([_last_numbers(run) for run in runs])
    return {name: found[name] for name in _METRICS if name in found}


def _differing(mappings: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return the keys whose values differ, with the value in each mapping or None."""
    return {
        key: found
        for key, found in by_key(mappings).items()
        if any(one != found[0] for one in found)
    }


def by_key(mappings: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return every key with its value in each mapping, or None where a mapping has none."""
    keys = dict.fromkeys(key for mapping in mappings for key in mapping)
    return {key: [mapping.get(key) for mapping in mappings] for key in keys}


def differing_settings(runs: Sequence[RecordedRun]) -> dict[str, list[Any]]:
    """Return all settings that differ, also those of one kind of run; what shapes results first."""
    found = _differing([_with_adapter_defaults(run.settings) for run in runs])
    given = {key for run in runs for key, value in run.settings.items() if value is not None}
    # Rank and scale have a value in every run, and alpha is the other name of the scale.
    for key in {"run.output", *({_SCALE, _ALPHA} - given)}:
        found.pop(key, None)
    return {key: found[key] for key in sorted(found, key=_place)}


def _with_adapter_defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with the rank, the scale and the alpha of adapters that begin fresh."""
    whole = dict(settings)
    if any(settings.get(key) is not None for key in ("adapter.start", "adapter.config")):
        return whole
    given = {name: settings.get(f"adapter.{name}") for name in ("rank", "scale", "alpha")}
    rule = LoRARule(**{name: value for name, value in given.items() if value is not None})
    return whole | {_RANK: rule.rank, _SCALE: rule.scale, _ALPHA: rule.scale * rule.rank}


def _place(key: str) -> int:
    """Return where a setting is listed. Sorting keeps the order of the config among equals."""
    if key in _FIRST:
        return _FIRST.index(key)
    return len(_FIRST) + key.startswith(_LAST)


def lines_of_settings(
    runs: Sequence[RecordedRun], settings: Mapping[str, Sequence[Any]]
) -> tuple[list[tuple[str, ...]], str]:
    """Return the rows of settings for a person, and a note about those that are left out.

    Left out are settings that only one kind of run has, if they have their default.
    """
    kinds = [SFTConfig() if run.is_supervised else TrainConfig() for run in runs]
    known = [{one.key: one.default for one in settings_of(kind)} for kind in kinds]
    rows: list[tuple[str, ...]] = []
    left_out = 0
    for key, values in settings.items():
        of_all = all(key in defaults for defaults in known) or not any(key in d for d in known)
        own = [(value, d[key]) for value, d in zip(values, known, strict=True) if key in d]
        if not of_all and key not in _FIRST and all(value == default for value, default in own):
            left_out += 1
            continue
        shown = (
            _NO_SUCH_SETTING if not of_all and key not in defaults else _shown(value)
            for value, defaults in zip(values, known, strict=True)
        )
        rows.append((key, *shown))
    note = (
        f"not shown: {left_out} settings that only one kind of run has, with their defaults; "
        "--json has them"
        if left_out
        else ""
    )
    return rows, note


def _shown(value: Any) -> str:
    return "not set" if value is None else shown_setting(value)

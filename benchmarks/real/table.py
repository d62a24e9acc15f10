"""The records of real_learning.py as tables of Markdown, and whether they are as expected."""

import json
from collections.abc import Iterable, Sequence
from statistics import median

from real.records import Record
from real.verdicts import Alike, collapsed, compare_sides, is_expected, learns

_NAMES = {"ours": "TextPolicy", "trl": "TRL"}


def groups_of(records: Iterable[Record]) -> list[list[Record]]:
    """Return the records of equal settings but for the seed, each group sorted by seed."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(_key(record, ["run.seed"]), []).append(record)
    return [sorted(group, key=_seed) for group in groups.values()]


def pairs_of(groups: Sequence[list[Record]]) -> list[tuple[list[Record], list[Record]]]:
    """Return our runs beside TRL's runs with the same options.

    At a constant rate the first steps of a run do not depend on its length, so our runs may be
    longer. The shortest ones are taken.
    """
    ours = [group for group in groups if _side(group[0]) == "ours"]
    pairs: list[tuple[list[Record], list[Record]]] = []
    for theirs in groups:
        same = [one for one in ours if _covers(one[0], theirs[0])]
        if _side(theirs[0]) != "ours" and same:
            pairs.append((min(same, key=_steps), theirs))
    return pairs


def _covers(ours: Record, theirs: Record) -> bool:
    """Return whether our run begins as TRL's run: with the same options, for as many steps."""
    constant = ours["settings"]["options"].get("trainer.schedule") == "constant"
    free = ["run.seed", "run.steps"] if constant else ["run.seed"]
    keys = [_key(one, free, side="", versions={}) for one in (ours, theirs)]
    return keys[0] == keys[1] and len(ours["rewards"]) >= len(theirs["rewards"])


def as_expected(records: Sequence[Record]) -> bool:
    """Return whether there are records and all their verdicts are as expected."""
    compared = [compare_sides(*pair) for pair in pairs_of(groups_of(records))]
    alike = all(one.ok for one in compared if one)
    # What TRL's run learns is a fact about TRL; the comparison says whether ours does the same.
    ours = [record for record in records if _side(record) == "ours"]
    return bool(ours) and alike and all(map(is_expected, ours))


def markdown(records: Sequence[Record]) -> str:
    """Return both tables."""
    groups = groups_of(records)
    heads = [
        "task",
        "run",
        "steps",
        "samples",
        "before",
        "after, by seed",
        "CPU minutes",
        "learned",
    ]
    table = _table(heads, [_row(group) for group in sorted(groups, key=_order)])
    pairs = pairs_of(groups)
    if not pairs:
        return table
    what = ["tenths that agree", "mean reward, difference", "held-out, difference"]
    heads = ["task", "seeds", "steps", *what, "alike"]
    return f"{table}\n\n{_table(heads, [_pair_row(*pair) for pair in pairs])}"


def _row(group: Sequence[Record]) -> list[str]:
    first = group[0]
    options = first["settings"]["options"]
    after = ", ".join(_score(record["after"]) for record in group)
    samples = len(first["rewards"]) * first["samples_per_step"]
    minutes = median(record["cpu_seconds"] for record in group) / 60
    return [
        f"`{options['task.env']}`",
        _name(first),
        str(len(first["rewards"])),
        str(samples),
        _score(first["before"]),
        after,
        f"{minutes:.0f}",
        _verdict(group),
    ]


def _verdict(group: Sequence[Record]) -> str:
    text = f"{sum(map(learns, group))} of {len(group)}"
    fallen = 0 if group[0]["settings"]["control"] else sum(map(collapsed, group))
    return f"{text}, {fallen} collapsed" if fallen else text


def _pair_row(ours: Sequence[Record], theirs: Sequence[Record]) -> list[str]:
    task = f"`{ours[0]['settings']['options']['task.env']}`"
    seeds = f"{len(ours)}, {len(theirs)}"
    alike = compare_sides(ours, theirs)
    return [task, seeds, *(_alike_cells(alike) if alike else ["-"] * 4 + ["too few seeds"])]


def _alike_cells(alike: Alike) -> list[str]:
    tenths = f"{alike.agreeing} of {alike.tenths}"
    answer = "yes" if alike.ok else "no"
    return [str(alike.steps), tenths, str(alike.area), str(alike.heldout or "-"), answer]


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _score(score: dict[str, float]) -> str:
    return f"{score['mean']:.3f} ± {score['standard_error']:.3f}"


def _name(record: Record) -> str:
    settings = record["settings"]
    if settings["control"]:
        return "rewards shuffled"
    variant = "" if settings["variant"] == "lora" else f", {settings['variant']}"
    return _NAMES[settings["side"]] + variant


def _order(group: Sequence[Record]) -> tuple[str, int, str]:
    options = group[0]["settings"]["options"]
    return options["task.env"], len(group[0]["rewards"]), _name(group[0])


def _side(record: Record) -> str:
    return record["settings"]["side"]


def _seed(record: Record) -> int:
    return record["settings"]["options"]["run.seed"]


def _steps(group: Sequence[Record]) -> int:
    return len(group[0]["rewards"])


def _key(record: Record, free: Sequence[str], **changes: object) -> str:
    """Return the settings as a text, with these changes, and without the options in `free`."""
    settings = record["settings"] | changes
    options = {key: v for key, v in settings["options"].items() if key not in free}
    return json.dumps(settings | {"options": options}, sort_keys=True)

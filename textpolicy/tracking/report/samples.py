"""Choose the samples of the report: whole groups, spread over the run, up to a size in bytes."""

import json
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

from textpolicy.tracking.jsonl import read_rows

_MAX_STEPS = 60
MAX_TEXT_CHARACTERS = 6000


def choose_samples(path: Path, limit: int) -> tuple[list[dict[str, Any]], int]:
    """Return rows of at most about `limit` bytes of JSON in order, and the file's number of rows.

    The first group of every chosen step is taken before the second group of any step.
    """
    total, sizes = _group_sizes(path)
    left, chosen = limit, set[tuple[int, int]]()
    by_step = {step: [key for key in sizes if key[0] == step] for step in _spread_steps(sizes)}
    for keys in zip_longest(*by_step.values()):
        for key in filter(None, keys):
            if sizes[key] <= left:
                left -= sizes[key]
                chosen.add(key)
    return [_cut(row) for row in read_rows(path) if _key(row) in chosen], total


def _group_sizes(path: Path) -> tuple[int, dict[tuple[int, int], int]]:
    """Return the number of rows, and the bytes of each group in the report."""
    sizes: dict[tuple[int, int], int] = {}
    total = 0
    for row in read_rows(path):
        total += 1
        sizes[_key(row)] = sizes.get(_key(row), 0) + len(json.dumps(_cut(row)))
    return total, sizes


def _spread_steps(sizes: Mapping[tuple[int, int], int]) -> Iterator[int]:
    """Return at most `_MAX_STEPS` of the steps, with the first and the last step among them."""
    steps = sorted({step for step, _ in sizes})
    count = min(_MAX_STEPS, len(steps))
    places = {round(i * (len(steps) - 1) / max(1, count - 1)) for i in range(count)}
    return (steps[place] for place in sorted(places))


def _key(row: Mapping[str, Any]) -> tuple[int, int]:
    return row["step"], row.get("group", 0)


def _cut(value: Any) -> Any:
    """Return the value with long texts cut, each with a note of how many characters are cut."""
    if isinstance(value, str) and len(value) > MAX_TEXT_CHARACTERS:
        more = len(value) - MAX_TEXT_CHARACTERS
        return f"{value[:MAX_TEXT_CHARACTERS]}\n[{more:,} characters more in samples.jsonl]"
    if isinstance(value, dict):
        return {name: _cut(part) for name, part in value.items()}
    return [_cut(part) for part in value] if isinstance(value, list) else value

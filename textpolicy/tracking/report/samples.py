"""The completions that a page shows: whole groups, spread over the run, in so many bytes."""

import json
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

from textpolicy.tracking.jsonl import read_rows

_MAX_STEPS = 60
MAX_TEXT_CHARACTERS = 6000
"""Characters of one text that are shown."""

_Group = list[dict[str, Any]]


def choose_samples(path: Path, limit: int) -> tuple[_Group, int]:
    """Rows of about `limit` bytes of JSON at most, in order, and how many the file has.

    The first group of each chosen step comes before the second of any.
    """
    total, sizes = _sizes(path)
    left, chosen = limit, set[tuple[int, int]]()
    by_step = {step: [key for key in sizes if key[0] == step] for step in _spread(sizes)}
    for keys in zip_longest(*by_step.values()):
        for key in filter(None, keys):
            if sizes[key] <= left:
                left -= sizes[key]
                chosen.add(key)
    return [_shown(row) for row in read_rows(path) if _key(row) in chosen], total


def _sizes(path: Path) -> tuple[int, dict[tuple[int, int], int]]:
    """How many rows there are, and the bytes of each group as it would be shown."""
    sizes: dict[tuple[int, int], int] = {}
    total = 0
    for row in read_rows(path):
        total += 1
        sizes[_key(row)] = sizes.get(_key(row), 0) + len(json.dumps(_shown(row)))
    return total, sizes


def _spread(sizes: Mapping[tuple[int, int], int]) -> Iterator[int]:
    """At most `_MAX_STEPS` of the steps, the first and the last among them."""
    steps = sorted({step for step, _ in sizes})
    count = min(_MAX_STEPS, len(steps))
    places = {round(i * (len(steps) - 1) / max(1, count - 1)) for i in range(count)}
    return (steps[place] for place in sorted(places))


def _key(row: Mapping[str, Any]) -> tuple[int, int]:
    return row["step"], row.get("group", 0)


def _shown(value: Any) -> Any:
    """The row with its long texts cut off, and a word that they were."""
    if isinstance(value, str) and len(value) > MAX_TEXT_CHARACTERS:
        more = len(value) - MAX_TEXT_CHARACTERS
        return f"{value[:MAX_TEXT_CHARACTERS]}\n[{more:,} characters more in samples.jsonl]"
    if isinstance(value, dict):
        return {name: _shown(part) for name, part in value.items()}
    return [_shown(part) for part in value] if isinstance(value, list) else value

"""Numbers that a judge reports about its own work: none says that an answer is right."""

from collections.abc import Iterable

NO_GRADE = "no_grade"
"""The share of answers of the judge without a grade."""
CACHED = "cached"
"""The share of answers that were known, for which the judge was not asked."""
COSTS = frozenset({"prompt_tokens", "completion_tokens", "retries", CACHED, "cost"})
"""What the judge has cost. `metrics.jsonl` has these numbers, and lines for people do not."""


def numbers_of_judges(names: Iterable[str]) -> set[str]:
    """Return those of the names, such as "rewards/strict/cached", that judges have reported.

    A judge always reports `no_grade` too: a `cost` without it is a number of the user's own reward.
    In short names, a dot comes after the name of the function: "strict.cached".
    """
    parts = {name: name.replace(".", "/").rpartition("/") for name in names}
    judges = {function for function, _, own in parts.values() if own == NO_GRADE}
    return {
        name
        for name, (function, _, own) in parts.items()
        if function in judges and (own in COSTS or own == NO_GRADE)
    }


def costs_of_judges(names: Iterable[str]) -> set[str]:
    """Return those of the names that say what judges have cost."""
    return {name for name in numbers_of_judges(names) if not name.endswith(NO_GRADE)}

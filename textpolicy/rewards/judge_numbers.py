"""Numbers that a judge reports about its own work: none says that an answer is right."""

NO_GRADE = "no_grade"
"""The share of answers of the judge without a grade."""
CACHED = "cached"
"""The share of answers that were known, for which the judge was not asked."""
COSTS = frozenset({"prompt_tokens", "completion_tokens", "retries", CACHED, "cost"})
"""What the judge has cost. `metrics.jsonl` has these numbers, and lines for people do not."""
ABOUT_THE_JUDGE = COSTS | {NO_GRADE}


def own_name(name: str) -> str:
    """Return the name that a reward gave a number: "cached" of "rewards/strict/cached"."""
    return name.replace("/", ".").rpartition(".")[2]

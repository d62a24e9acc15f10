"""The numbers that rewards report beside the reward, under the short names that people read."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from textpolicy.rewards.judge_numbers import costs_of_judges
from textpolicy.untrusted.terminal import shorten_line

REPORTED = "rewards/"
"""What the names of these metrics begin with, after the prefix of an evaluation."""
ERRORS = "standard_errors/"
"""What the names of their standard errors begin with, on held-out tasks."""
# How many numbers are shown in one line, and how long a name may be.
_SHOWN, _NAME_WIDTH = 4, 24


@dataclass(frozen=True)
class NamedNumber:
    """A metric with its short name, and its standard error, which is None if it is not known."""

    name: str
    key: str
    value: float
    standard_error: float | None = None

    def __str__(self) -> str:
        return f"{shorten_line(self.name, _NAME_WIDTH)} {self.amount}"

    @property
    def amount(self) -> str:
        """The value and its standard error, as people read them."""
        error = "" if self.standard_error is None else f" ± {self.standard_error:.3f}"
        return f"{self.value:.3f}{error}"


def named_numbers(metrics: Mapping[str, float], prefix: str = "") -> list[NamedNumber]:
    """Return the numbers of a `Score` and, of several reward functions, the value of each.

    A number has the name that the reward gave it. If another number has this name too, the name of
    the reward function comes first: "mine.right".
    """
    start, found = f"{prefix}{REPORTED}", dict[str, tuple[str, str]]()
    for key in metrics:
        function, _, name = key.removeprefix(start).partition("/")
        if key.startswith(start) and name not in ("", "std"):
            found[key] = function, name
    several = len({function for function, _ in found.values()}) > 1
    # The mean of a single reward function is the reward.
    kept = {key: names for key, names in found.items() if several or names[1] != "mean"}
    short = {key: _short(*names) for key, names in kept.items()}
    uses = Counter(short.values())
    return [
        NamedNumber(
            short[key] if uses[short[key]] == 1 or name == "mean" else f"{function}.{name}",
            key,
            metrics[key],
            metrics.get(f"{prefix}{ERRORS}{function}/{name}"),
        )
        for key, (function, name) in kept.items()
    ]


def shown_numbers(metrics: Mapping[str, float], prefix: str = "") -> list[NamedNumber]:
    """Return the named numbers that people read: all but those of what a judge has cost."""
    costs = costs_of_judges(metrics)
    return [one for one in named_numbers(metrics, prefix) if one.key not in costs]


def describe_numbers(metrics: Mapping[str, float], prefix: str = "") -> list[str]:
    """Return a few of the named numbers as texts, and how many more there are."""
    numbers = shown_numbers(metrics, prefix)
    texts = list(map(str, numbers[:_SHOWN]))
    more = len(numbers) - _SHOWN
    return [*texts, f"{more} more in metrics.jsonl"] if more > 0 else texts


def _short(function: str, name: str) -> str:
    return function if name == "mean" else name

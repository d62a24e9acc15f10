"""Which problems are held out: hashes of the problems decide, so every run holds out the same."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from itertools import islice

HELD_OUT_SEED = 2024
_DRAWS_PER_HELD_OUT_TASK = 20
# One problem in four is held out, so that an environment with few problems has held-out ones too.
_ONE_IN = 4
# An environment has few problems if so many draws find fewer than so many different ones.
_SURVEY_DRAWS = 128
_MANY_PROBLEMS = 64


def held_out_draws(number: int) -> int:
    """Return how many draws to look for `number` held-out tasks in.

    These are at least the draws of a survey, which found the held-out problems.
    """
    return max(_SURVEY_DRAWS, _DRAWS_PER_HELD_OUT_TASK * number)


def is_held_out(problem: str) -> bool:
    """Return whether the hash of the problem is in the part that is held out."""
    return blake2b(problem.encode(), digest_size=1).digest()[0] < 256 // _ONE_IN


@dataclass(frozen=True, kw_only=True)
class ProblemSurvey:
    """How often the first draws of an environment found each problem.

    If there are many problems, their hashes split them. Of a few problems a quarter is held out,
    and at least one, but never the most frequent one, without which most draws would be useless
    for training. A single problem cannot be held out.
    """

    counts: Mapping[str, int]

    @classmethod
    def of(cls, drawn: Iterable[str]) -> "ProblemSurvey":
        """Return the survey of the problems of an environment, drawn in the order of one seed."""
        counts: dict[str, int] = {}
        for problem in islice(drawn, _SURVEY_DRAWS):
            counts[problem] = counts.get(problem, 0) + 1
            if len(counts) == _MANY_PROBLEMS:
                break
        return cls(counts=counts)

    @property
    def is_single(self) -> bool:
        """Whether all draws gave the same problem."""
        return len(self.counts) == 1

    @cached_property
    def listed(self) -> frozenset[str] | None:
        """The held-out problems, or None if there are too many to list."""
        if len(self.counts) >= _MANY_PROBLEMS:
            return None
        if self.is_single:
            return frozenset()
        most_frequent = max(self.counts, key=self.counts.__getitem__)
        by_hash = sorted(
            self.counts.keys() - {most_frequent},
            key=lambda text: blake2b(text.encode(), digest_size=8).digest(),
        )
        return frozenset(by_hash[: max(1, len(self.counts) // _ONE_IN)])

    def is_held_out(self, problem: str) -> bool:
        """Return whether training must not draw this problem."""
        return is_held_out(problem) if self.listed is None else problem in self.listed

    def note(self, name: str, *, tell_apart: str) -> str:
        """Return what a reader of held-out scores must know if the problems are few, or "".

        `tell_apart` says how the environment can tell problems apart that look the same.
        """
        found, draws = len(self.counts), sum(self.counts.values())
        if self.listed is None:
            return ""
        if self.is_single:
            return (
                f"environment {name} has one problem: {draws} draws gave the same one, so no "
                "problem is held out. Held-out tasks have the problem that is trained on, and "
                f"their score says nothing about new problems. {tell_apart}"
            )
        held_out = len(self.listed)
        return (
            f"environment {name} has few problems: {draws} draws gave {found} different ones. "
            f"{held_out} of the {found} {'is' if held_out == 1 else 'are'} held out and never "
            f"trained on, so the held-out score measures only {held_out} "
            f"problem{'s' * (held_out > 1)}"
        )

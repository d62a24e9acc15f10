"""Regular expressions with a time limit.

Python's engine takes exponential time on some patterns, and cannot be interrupted. So a match runs
in a process of its own, which stays warm and is killed when the time is up. `benchmarks/rewards.py`
measures what that costs.
"""

import re
from functools import cache

from textpolicy.errors import ConfigError
from textpolicy.rewards.call_reward import Callee, RewardResult
from textpolicy.rewards.children import Children
from textpolicy.rewards.reward_function import Reward, Sample


def pattern_match(text: str, pattern: str, *, whole: bool = False, seconds: float = 0.5) -> bool:
    """Whether the pattern is found in the text, or with `whole` is all of it.

    False as well if that cannot be said in `seconds`: what ties up the engine is no match.
    """
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{pattern!r} is no regular expression: {error}") from error
    outcomes: list[RewardResult] = []
    sample = Sample(prompt="", completion=text, example={"pattern": pattern, "whole": whole})
    _engine(seconds).run(0, [sample], lambda _, outcome: outcomes.append(outcome))
    return outcomes[0].value == 1.0


def _matches(completion: str, pattern: str, whole: bool) -> bool:
    """What runs in the other process."""
    search = re.fullmatch if whole else re.search
    return search(pattern, completion, re.DOTALL) is not None


@cache
def _engine(seconds: float) -> Children:
    # Two, so that one is ready while the other is replaced.
    engine = Children([Callee(Reward(_matches, "pattern_match"))], timeout=seconds, workers=2)
    engine.start(2)
    return engine

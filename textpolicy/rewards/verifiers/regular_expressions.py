"""Match regular expressions in a process that is killed when the time is up.

Python's engine takes exponential time for some patterns and cannot be interrupted.
"""

import re
from functools import cache

from textpolicy.errors import ConfigError
from textpolicy.rewards.call_reward import RewardResult
from textpolicy.rewards.reward_function import Reward, Sample
from textpolicy.rewards.weighted_rewards import Rewards
from textpolicy.rewards.worker_process import WorkerPool


def pattern_match(text: str, pattern: str, *, whole: bool = False, seconds: float = 0.5) -> bool:
    """Return whether the pattern matches part of the text, or with `whole` all, in `seconds`."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{pattern!r} is no regular expression: {error}") from error
    results: list[RewardResult] = []
    sample = Sample(prompt="", completion=text, example={"pattern": pattern, "whole": whole})
    _worker_pool(seconds).run(0, [sample], lambda _, result: results.append(result))
    return results[0].value == 1.0


def _matches(completion: str, pattern: str, whole: bool) -> bool:
    """Return whether the pattern matches; this is the function that the process calls."""
    search = re.fullmatch if whole else re.search
    return search(pattern, completion, re.DOTALL) is not None


@cache
def _worker_pool(seconds: float) -> WorkerPool:
    # With two processes, one is ready while the other is replaced.
    pool = WorkerPool(Rewards(Reward(_matches, "pattern_match"), workers=2), timeout=seconds)
    pool.start(2)
    return pool

"""Matching regular expressions that somebody else wrote, in bounded time."""

import math
from typing import Any, cast

import regex

from textpolicy.errors import ConfigError
from textpolicy.untrusted.bounds import MAX_PATTERN_SECONDS, MAX_REPETITIONS


def check_pattern(pattern: str) -> None:
    """Raise ValueError if the text is not a regular expression, or one that takes all memory."""
    repeats = [int(number) for number in regex.findall(r"(?<=[{,])\s*(\d{1,9})", pattern)]
    if math.prod(max(1, number) for number in repeats) > MAX_REPETITIONS:
        raise ValueError(f"it repeats a part more than {MAX_REPETITIONS:,} times")
    try:
        regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError, MemoryError) as error:
        raise ValueError(str(error)) from error


def match_pattern(pattern: str, text: str, *, whole: bool) -> Any:
    """Return the match of a regular expression at the start of a text, or of the whole text.

    Raise ConfigError if it is none or takes too long: some take exponential time.
    """
    function = cast(Any, regex.fullmatch if whole else regex.match)
    try:
        check_pattern(pattern)
        return function(pattern, text, timeout=MAX_PATTERN_SECONDS)
    except TimeoutError as error:
        raise ConfigError(
            f"the regular expression {pattern[:100]!r} takes too long on {text[:100]!r}. Write it "
            "without a repetition inside a repetition, such as (a+)+"
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"{pattern[:100]!r} is not a regular expression: {error}. Correct it in the config"
        ) from error

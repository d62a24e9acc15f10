"""Strict and loose accuracy of a text on a list of instructions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from textpolicy.errors import ConfigError
from textpolicy.rewards.verifiers.instructions.checkers import CHECKERS, KINDS

_LONGEST = 30_000
_MOST_INSTRUCTIONS = 100


@dataclass(frozen=True, kw_only=True)
class Following:
    """Which instructions a text follows, in their order.

    `strict` reads the text as it is. `loose` is also True if the text follows the instruction
    without its first line, its last line, both, or without asterisks in any of these.
    """

    strict: Sequence[bool]
    loose: Sequence[bool]


def instructions_followed(
    text: str, ids: Sequence[str], arguments: Sequence[Mapping[str, Any]]
) -> Following:
    """Return which instructions of IFEval the text follows. An empty text follows none.

    `ids` are such as "punctuation:no_comma", and `arguments` are the columns `kwargs` of the
    public data set. Raise ConfigError as `check_instructions` does.
    """
    given = [*zip(ids, check_instructions(ids, arguments), strict=True)]
    whole, *others = _loose_readings(text[:_LONGEST])
    strict = [_follows(whole, *one) for one in given]
    loose = [
        followed or any(_follows(reading, *one) for reading in others)
        for followed, one in zip(strict, given, strict=True)
    ]
    return Following(strict=strict, loose=loose)


def check_instructions(ids: Any, arguments: Any) -> list[dict[str, Any]]:
    """Return the arguments that each instruction needs, without those that it does not need.

    Raise ConfigError for an unknown instruction, and for arguments that are missing or wrong.
    """
    if not _is_list(ids) or not _is_list(arguments) or len(ids) != len(arguments):
        raise ConfigError(
            f"instruction_id_list is {ids!r:.80} and kwargs is {arguments!r:.80}; expected two "
            f"lists of one length, at most {_MOST_INSTRUCTIONS}: ids such as "
            "'punctuation:no_comma', and the arguments of each"
        )
    return [_arguments_of(id, given) for id, given in zip(ids, arguments, strict=True)]


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and 0 < len(value) <= _MOST_INSTRUCTIONS


def _arguments_of(id: Any, given: Any) -> dict[str, Any]:
    checker = CHECKERS.get(id) if isinstance(id, str) else None
    if checker is None:
        near = get_close_matches(str(id), CHECKERS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"no instruction {id!r:.80}; known: {', '.join(CHECKERS)}.{hint}")
    if not isinstance(given, Mapping):
        raise ConfigError(f"the arguments of {id} are {given!r:.80}; expected a mapping")
    # Tables hold the arguments of all instructions, and have numbers as fractions.
    known = {name: _whole(given.get(name)) for name in checker.needs}
    wrong = [
        f"{name} is {known[name]!r:.80}; expected {KINDS[kind][1]}"
        for name, kind in checker.needs.items()
        if not KINDS[kind][0](known[name])
    ]
    if wrong:
        raise ConfigError(f"the arguments of {id} cannot be used: {'; '.join(wrong)}")
    return known


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _follows(text: str, id: str, given: Mapping[str, Any]) -> bool:
    return bool(text.strip()) and CHECKERS[id].follows(text, given)


def _loose_readings(text: str) -> list[str]:
    """Return the text, and the texts that loose accuracy reads as well."""
    lines = text.split("\n")
    cut = ["\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1])]
    readings = [text, *cut]
    # Most texts have no asterisks, so that half of the readings are the same.
    return [*dict.fromkeys([*readings, *(reading.replace("*", "") for reading in readings)])]

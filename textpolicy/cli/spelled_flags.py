"""Other spellings of flags: a setting's key as its flag, and true or false after a flag."""

from argparse import Action, BooleanOptionalAction
from collections.abc import Mapping, Sequence
from itertools import zip_longest

from textpolicy.config.option_types import read_truth
from textpolicy.errors import ConfigError


def spell_as_flags(
    given: Sequence[str], actions: Mapping[str, Action], *, with_words: bool
) -> list[str]:
    """Return the arguments in the spelling that argparse reads.

    `--trainer.lr` becomes `--lr`, and `--tensorboard=True` becomes `--tensorboard`. If no words but
    values of flags are given, `--tensorboard True` does so too. Raise `ConfigError` for other
    values of such a flag.
    """
    by_key = {f"--{one.dest}": one.option_strings[0] for one in actions.values() if "." in one.dest}
    found: list[str] = []
    taken = False
    for word, following in zip_longest(given, given[1:], fillvalue=""):
        if taken:
            taken = False
            continue
        name, equals, value = word.partition("=")
        flag = by_key.get(name, name)
        if not _is_switch(actions.get(flag)):
            found.append(flag + equals + value)
            continue
        taken = not equals and not with_words and _is_truth(following)
        value = following if taken else value
        found += _switched(actions[flag], flag, value) if taken or equals else [flag]
    return found


def _is_switch(action: Action | None) -> bool:
    """Return whether an action sets True, or True and False by two flags, and takes no value."""
    return isinstance(action, BooleanOptionalAction) or (
        action is not None and action.nargs == 0 and action.const is True
    )


def _is_truth(text: str) -> bool:
    try:
        read_truth(text)
    except ValueError:
        return False
    return True


def _switched(action: Action, flag: str, value: str) -> list[str]:
    """Return the flag that sets what the flag with this value means, or nothing for a default."""
    positive, *negative = action.option_strings
    if not _is_truth(value):
        other = f", or {negative[0]} for false" if negative else ""
        raise ConfigError(f"{flag} is {value!r}; write {positive} alone for true{other}")
    if read_truth(value) == (flag == positive):
        return [positive]
    return negative[:1]

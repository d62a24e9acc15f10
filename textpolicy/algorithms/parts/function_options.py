"""Read the options of an algorithm's functions. Some options name a function, as `kl="k2"` does.

A name may have numbers: `average="constant(tokens=64)"`, `weights=["truncate_tokens(cap=3)"]`.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from difflib import get_close_matches
from functools import partial
from inspect import isfunction, signature
from types import ModuleType
from typing import Any, get_args

from textpolicy.algorithms.parts import averages, kl, ratio_levels, token_weights
from textpolicy.errors import ConfigError
from textpolicy.untrusted.parsing import parse_toml

FROM_TRAINER = {"lengths", "parts"}
"""Arguments of an advantage function that are no options: the trainer fills them in."""


def _public(module: ModuleType) -> dict[str, Callable[..., Any]]:
    """Return the functions that a module defines for an option, by their names."""
    return {
        name: value
        for name, value in vars(module).items()
        if isfunction(value) and value.__module__ == module.__name__ and name[0] != "_"
    }


NAMED_FUNCTIONS: Mapping[str, Mapping[str, Callable[..., Any]]] = {
    "average": _public(averages),
    "ratio_level": {
        "token": ratio_levels.TOKEN,
        "sequence": ratio_levels.SEQUENCE,
        "whole_sequence": ratio_levels.WHOLE_SEQUENCE,
    },
    "kl": _public(kl),
    "weights": _public(token_weights),
    "correction": _public(token_weights),
}
"""The functions that an option takes, by the name of the option and their own."""
SYNONYMS = {
    "tis": "truncate_tokens",
    "icepop": "mask_tokens",
    "opsm": "off_policy_mask",
    "80/20": "top_entropy_tokens",
}
"""Names by which papers and other libraries know these functions, in small letters."""


def functions_for(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options with functions in place of their names."""
    found = dict(options)
    for option in NAMED_FUNCTIONS.keys() & found.keys():
        value = found[option]
        if option == "weights":
            weights = [value] if isinstance(value, str) else value
            found[option] = tuple(_function(option, weight) for weight in weights)
        else:
            found[option] = _function(option, value)
    return found


def _function(option: str, value: Any) -> Any:
    """Return the function for "name" or "name(option=number, ...)"; a function as it is."""
    if not isinstance(value, str):
        return value
    written, numbers = _parsed(option, value)
    known = NAMED_FUNCTIONS[option]
    name = SYNONYMS.get(written.lower(), written)
    if name not in known:
        raise ConfigError(
            f"{option} is {written!r}; known: {', '.join(known)}{did_you_mean(name, known)}"
        )
    function = known[name]
    try:
        signature(function).bind(None, None, **numbers)
    except TypeError as error:
        takes = sorted(option_names(function))
        form = f"{', '.join(takes)}; write {name}({takes[0]}=2.0)" if takes else "no numbers"
        raise ConfigError(f"{option} is {value!r}: {error}. {name} takes {form}") from error
    return partial(function, **numbers) if numbers else function


def _parsed(option: str, text: str) -> tuple[str, dict[str, float]]:
    match = re.fullmatch(r"\s*([^()\s]+)\s*(?:\((.*)\))?\s*", text)
    with suppress(ValueError):
        numbers = parse_toml(f"_ = {{{match[2] or ''}}}")["_"] if match else {}
        if match and all(type(number) in (int, float) for number in numbers.values()):
            return match[1], numbers
    raise ConfigError(
        f"{option} is {text!r}; expected a name, with numbers in brackets if it takes any, "
        "such as mask_tokens(low=0.5, high=5.0)"
    )


def option_names(function: Callable[..., Any]) -> set[str]:
    """Return the options of a function, with those of `**options: Unpack[SomeTypedDict]`."""
    found: set[str] = set()
    for parameter in signature(function).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            found.update(*(typed.__annotations__ for typed in get_args(parameter.annotation)))
        elif parameter.kind is parameter.KEYWORD_ONLY or parameter.default is not parameter.empty:
            found.add(parameter.name)
    return found - FROM_TRAINER


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of a message that asks for the nearest known name, or an empty text."""
    near = get_close_matches(name, known, n=1)
    return f". Did you mean {near[0]!r}?" if near else ""

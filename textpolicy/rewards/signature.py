"""Which arguments a reward function asks for, read once from its signature."""

import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from textpolicy.errors import ConfigError
from textpolicy.rewards.reward_function import CONTEXT_FIELDS, Reward, Sample

PLAIN = ("prompt", "completion", "example")
BATCHED = ("prompts", "completions", "examples")
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Signature:
    """What a reward is called with: three arguments by position, or those that it names."""

    fixed: tuple[str, str, str]
    by_position: bool
    required: tuple[str, ...]
    optional: tuple[str, ...]
    takes_context: bool

    def missing(self, columns: Collection[str]) -> list[str]:
        """The names without a default that neither the row nor the context has."""
        known = {*self.fixed, *CONTEXT_FIELDS, *columns}
        return [name for name in self.required if name not in known]

    def arguments(self, sample: Sample) -> Arguments:
        """The arguments of one call."""
        first = (sample.prompt, sample.completion, sample.example)
        return self._fill(first, sample.example, sample.context)

    def batch_arguments(self, samples: Sequence[Sample]) -> Arguments:
        """The arguments of one call for all samples: a list in each place."""
        prompts = [sample.prompt for sample in samples]
        completions = [sample.completion for sample in samples]
        examples = [sample.example for sample in samples]
        context = _transposed([sample.context for sample in samples])
        return self._fill((prompts, completions, examples), _transposed(examples), context)

    def _fill(
        self, first: tuple[Any, ...], columns: Mapping[str, Any], context: Mapping[str, Any]
    ) -> Arguments:
        extra = dict(context) if self.takes_context else {}
        if self.by_position:
            return first, extra
        known = {**columns, **context, **dict(zip(self.fixed, first, strict=True))}
        named = {name: known[name] for name in self.required}
        named |= {name: known[name] for name in self.optional if name in known}
        return (), extra | named


def read_signature(reward: Reward) -> Signature:
    """Raises `ConfigError` for a function that could never see what the model said."""
    try:
        parameters = list(inspect.signature(reward.function).parameters.values())
    except ValueError:
        # Builtins have no signature to read.
        parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY) for name in PLAIN]
    fixed = BATCHED if reward.batched else PLAIN
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    sees_completion = bool({fixed[1], *CONTEXT_FIELDS} & set(names))
    by_position = not sees_completion and _takes_three(parameters)
    if not (sees_completion or by_position):
        raise ConfigError(
            f"reward {reward.name} takes ({', '.join(map(str, parameters))}): it would not see the "
            f"completion; expected ({', '.join(fixed)}), or those of them and of the row's columns "
            f"that it needs, by name, with `{fixed[1]}` among them"
        )
    return Signature(
        fixed=fixed,
        by_position=by_position,
        required=() if by_position else tuple(_names(parameters, required=True)),
        optional=() if by_position else tuple(_names(parameters, required=False)),
        takes_context=any(p.kind is p.VAR_KEYWORD for p in parameters),
    )


def check_columns(reward: Reward, signature: Signature, columns: Collection[str]) -> None:
    """Raise `ConfigError` if the reward asks for what the rows do not have."""
    missing = signature.missing(columns)
    if not missing:
        return
    unused = {*columns, *signature.fixed, *CONTEXT_FIELDS} - {*signature.required}
    near = get_close_matches(missing[0], sorted(unused), n=1)
    hint = f" Did you mean `{near[0]}`?" if near else ""
    raise ConfigError(
        f"your reward {reward.name} asks for {_quoted(missing)}; the rows have "
        f"{_quoted(columns) or 'no columns'}.{hint} Rename the parameter, give it a default, or "
        f"ask for `{signature.fixed[2]}`, which is the whole row"
    )


def _takes_three(parameters: Sequence[inspect.Parameter]) -> bool:
    required = [p for p in parameters if p.default is p.empty]
    positional = [p for p in required if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    starred = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    keywords = any(p.kind is p.KEYWORD_ONLY for p in required)
    return not keywords and (len(positional) == 3 or (starred and len(positional) < 3))


def _names(parameters: Sequence[inspect.Parameter], *, required: bool) -> list[str]:
    return [
        p.name
        for p in parameters
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        and (p.default is p.empty) == required
    ]


def _transposed(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Columns as lists, None where a row lacks one that another has."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _quoted(names: Collection[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)

"""PEFT's LoraConfig: the options of PEFT with the meaning that PEFT gives them."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

from textpolicy.adapters.config.model_layout import AdaptableModule, ModelLayout
from textpolicy.adapters.config.rules import LoRARule
from textpolicy.adapters.config.selection import strip_expression
from textpolicy.errors import AdapterError, ConfigError
from textpolicy.untrusted.patterns import match_pattern

_ALL_LINEAR = "all-linear"
_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True, kw_only=True, slots=True)
class PeftTargets:
    """A list of names matches whole paths and endings of paths; a string is a regular expression.

    "all-linear" means every linear and expert layer except the output head and routers. The
    patterns map regular expressions for endings of paths to a rank or an alpha. The first pattern
    that matches applies.
    """

    target_modules: Collection[str] | str
    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    init_lora_weights: str = "uniform"
    exclude_modules: Collection[str] | str = ()
    layers_to_transform: Collection[int] | None = None
    layers_pattern: Collection[str] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict[str, int])
    alpha_pattern: Mapping[str, float] = field(default_factory=dict[str, float])

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules", "layers_pattern", "layers_to_transform"):
            given = getattr(self, name)
            # Equal configs compare equal whatever the order of their names.
            if given is not None and not isinstance(given, str):
                object.__setattr__(self, name, tuple(sorted(set(given))))
        if not self.target_modules:
            raise ConfigError(
                f"target_modules is empty; expected names, a regular expression, or {_ALL_LINEAR!r}"
            )
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ConfigError("layers_to_transform needs target_modules as a list of names")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError("layers_pattern needs layers_to_transform")
        # Making every possible rule once raises for a wrong number now.
        _ = self.rules

    @property
    def rules(self) -> Sequence[LoRARule]:
        ranks = [self.r, *self.rank_pattern.values()]
        alphas = [self.lora_alpha, *self.alpha_pattern.values()]
        return [self._make_rule(rank, alpha) for rank in ranks for alpha in alphas]

    def assign_rules(self, layout: ModelLayout) -> dict[str, LoRARule]:
        """Return the rule of each selected module by path; raise if a name matches nothing."""
        self._check_names(layout)
        return {
            path: self.rule_for(path)
            for path, one in layout.adaptable.items()
            if self._selects(one)
        }

    def rule_for(self, path: str) -> LoRARule:
        """Return the rule of a selected module."""
        return self._make_rule(
            _first_match(self.rank_pattern, path, self.r),
            _first_match(self.alpha_pattern, path, self.lora_alpha),
        )

    def with_dropout(self, dropout: float) -> "PeftTargets":
        return replace(self, lora_dropout=dropout)

    def _make_rule(self, rank: int, alpha: float) -> LoRARule:
        return LoRARule(
            kind="dora" if self.use_dora else "lora",
            rank=rank,
            alpha=alpha,
            rslora=self.use_rslora,
            dropout=self.lora_dropout,
            a_init=self.init_lora_weights,
            bias=self.lora_bias,
        )

    def _selects(self, one: AdaptableModule) -> bool:
        if self.exclude_modules and _matches(self.exclude_modules, one.path):
            return False
        if self.target_modules == _ALL_LINEAR:
            return one.kind != "embedding" and not one.by_name
        return _matches(self.target_modules, one.path) and self._in_chosen_layers(one.path)

    def _in_chosen_layers(self, path: str) -> bool:
        # A whole path in target_modules names its layer itself.
        if not self.layers_to_transform or path in self.target_modules:
            return True
        patterns = self.layers_pattern or (r"[^.]*",)
        found = (
            match_pattern(rf"(?:^|.*?\.){pattern}\.(\d+)\.", path, whole=False)
            for pattern in patterns
        )
        number = next((int(match[1]) for match in found if match), None)
        return number in self.layers_to_transform

    def _check_names(self, layout: ModelLayout) -> None:
        named = {"target_modules": self.target_modules, "exclude_modules": self.exclude_modules}
        patterns = {"rank_pattern": self.rank_pattern, "alpha_pattern": self.alpha_pattern}
        matchers = [
            (option, name, partial(_matches, alone))
            for option, given in named.items()
            for name, alone in _split_names(given).items()
        ] + [
            (option, pattern, partial(_matches_ending, pattern))
            for option, given in patterns.items()
            for pattern in given
        ]
        problems = [
            f"{option} has {name!r}, which matches nothing; "
            f"nearest: {layout.nearest(strip_expression(name))}"
            for option, name, matches in matchers
            if not any(map(matches, layout.adaptable))
        ]
        depth = math.inf if layout.blocks is None else len(layout.blocks)
        problems += [
            f"layers_to_transform has {number}, the model has blocks 0 to {depth - 1}"
            for number in self.layers_to_transform or ()
            if not 0 <= number < depth
        ]
        if problems:
            text = "\n  ".join(problems)
            raise AdapterError(f"The config's PEFT options do not fit the model\n  {text}")


def _split_names(given: Collection[str] | str) -> dict[str, Collection[str] | str]:
    """Return each name of a list with a list of that name alone, or one regular expression."""
    if isinstance(given, str):
        return {} if given == _ALL_LINEAR else {given: given}
    return {name: (name,) for name in given}


def _matches(names: Collection[str] | str, path: str) -> bool:
    if isinstance(names, str):
        return match_pattern(names, path, whole=True) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def _matches_ending(pattern: str, path: str) -> bool:
    return match_pattern(rf"(.*\.)?({pattern})$", path, whole=False) is not None


def _first_match(patterns: Mapping[str, _Number], path: str, default: _Number) -> _Number:
    found = (value for pattern, value in patterns.items() if _matches_ending(pattern, path))
    return next(found, default)

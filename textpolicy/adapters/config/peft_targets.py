"""The words of PEFT's LoraConfig, with PEFT's meaning."""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from textpolicy.adapters.config.model_layout import AdaptableModule, ModelLayout
from textpolicy.adapters.config.rules import LoRARule
from textpolicy.adapters.config.selection import plain_spelling
from textpolicy.errors import AdapterError, ConfigError

ALL_LINEAR = "all-linear"
Number = TypeVar("Number", int, float)


@dataclass(frozen=True, kw_only=True, slots=True)
class PeftTargets:
    """A list of names matches exact paths and their ends; a string is a regular expression.

    "all-linear" is every linear and expert layer but the output head and routers. Patterns map
    regular expressions for the ends of paths to a rank or an alpha; the first that matches counts.
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
        plain = {
            "target_modules": _listed(self.target_modules),
            "exclude_modules": _listed(self.exclude_modules),
            "layers_pattern": _listed(self.layers_pattern),
            "layers_to_transform": self.layers_to_transform and _listed(self.layers_to_transform),
        }
        for name, value in plain.items():
            object.__setattr__(self, name, value)
        if not self.target_modules:
            raise ConfigError(
                f"target_modules is empty; expected names, a regular expression, or {ALL_LINEAR!r}"
            )
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ConfigError("layers_to_transform needs target_modules as a list of names")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError("layers_pattern needs layers_to_transform")
        # Every rule that may come of this is made once, so that a wrong number is named now.
        _ = self.rules

    @property
    def rules(self) -> Sequence[LoRARule]:
        ranks = [self.r, *self.rank_pattern.values()]
        alphas = [self.lora_alpha, *self.alpha_pattern.values()]
        return [self._rule(rank, alpha) for rank in ranks for alpha in alphas]

    def assign(self, layout: ModelLayout) -> dict[str, LoRARule]:
        self._check_words(layout)
        return {
            path: self.rule_for(path) for path, site in layout.sites.items() if self._means(site)
        }

    def rule_for(self, path: str) -> LoRARule:
        """The rule of a module that is meant."""
        return self._rule(
            _first_match(self.rank_pattern, path, self.r),
            _first_match(self.alpha_pattern, path, self.lora_alpha),
        )

    def with_dropout(self, dropout: float) -> "PeftTargets":
        return replace(self, lora_dropout=dropout)

    def _rule(self, rank: int, alpha: float) -> LoRARule:
        return LoRARule(
            kind="dora" if self.use_dora else "lora",
            rank=rank,
            alpha=alpha,
            rslora=self.use_rslora,
            dropout=self.lora_dropout,
            a_init=self.init_lora_weights,
            bias=self.lora_bias,
        )

    def _means(self, site: AdaptableModule) -> bool:
        if self.exclude_modules and _named(self.exclude_modules, site.path):
            return False
        if self.target_modules == ALL_LINEAR:
            return site.kind != "embedding" and not site.by_name
        return _named(self.target_modules, site.path) and self._in_layers(site.path)

    def _in_layers(self, path: str) -> bool:
        # A whole path says its layer itself.
        if not self.layers_to_transform or path in self.target_modules:
            return True
        patterns = self.layers_pattern or (r"[^.]*",)
        found = (re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", path) for pattern in patterns)
        number = next((int(match[1]) for match in found if match), None)
        return number in self.layers_to_transform

    def _check_words(self, layout: ModelLayout) -> None:
        nearest, paths = layout.nearest, layout.sites
        words = {"target_modules": self.target_modules, "exclude_modules": self.exclude_modules}
        problems = [
            f"{word} has {name!r}, which matches nothing; nearest: {nearest(plain_spelling(name))}"
            for word, given in words.items()
            for name, alone in _one_by_one(given).items()
            if not any(_named(alone, path) for path in paths)
        ]
        patterns = {"rank_pattern": self.rank_pattern, "alpha_pattern": self.alpha_pattern}
        problems += [
            f"{word} has {pattern!r}, which matches nothing; "
            f"nearest: {nearest(plain_spelling(pattern))}"
            for word, given in patterns.items()
            for pattern in given
            if not any(_ends_in(pattern, path) for path in paths)
        ]
        depth = math.inf if layout.blocks is None else len(layout.blocks)
        problems += [
            f"layers_to_transform has {number}, the model has blocks 0 to {depth - 1}"
            for number in self.layers_to_transform or ()
            if not 0 <= number < depth
        ]
        if problems:
            raise AdapterError("PEFT's words do not fit the model\n  " + "\n  ".join(problems))


def _one_by_one(given: Collection[str] | str) -> dict[str, Collection[str] | str]:
    """Each name of a list as a list of its own; a regular expression as it is."""
    if isinstance(given, str):
        return {} if given == ALL_LINEAR else {given: given}
    return {name: (name,) for name in given}


def _named(names: Collection[str] | str, path: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def _ends_in(pattern: str, path: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def _first_match(patterns: Mapping[str, Number], path: str, otherwise: Number) -> Number:
    found = (value for pattern, value in patterns.items() if _ends_in(pattern, path))
    return next(found, otherwise)


def _listed(given: Collection[Any] | str) -> tuple[Any, ...] | str:
    """JSON's lists and Python's sets in one form, so that equal configs are equal."""
    return given if isinstance(given, str) else tuple(sorted(set(given)))

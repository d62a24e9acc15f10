"""Which modules of a model a config means, and clear words where it means none."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

from textpolicy.adapters.config.model_layout import AdaptableModule, ModelLayout
from textpolicy.adapters.config.rules import LoRARule
from textpolicy.errors import AdapterError, ConfigError
from textpolicy.types import check_fields


@runtime_checkable
class Selection(Protocol):
    """A way to say which modules get which rule."""

    @property
    def rules(self) -> Sequence[LoRARule]:
        """All that may be assigned."""
        ...

    def assign(self, layout: ModelLayout) -> dict[str, LoRARule]:
        """The rule of each chosen site, by path; an error names every word that chose nothing."""
        ...

    def rule_for(self, path: str) -> LoRARule:
        """The rule of a module that is known to have been chosen."""
        ...

    def with_dropout(self, dropout: float) -> "Selection":
        """The same choice, its rules with another dropout."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class LastBlocks:
    """One rule for the last `num_layers` blocks; -1 is all of them.

    `keys` are exact paths, either inside a block ("self_attn.q_proj") or in the whole model; None
    is every linear and expert layer of the blocks but their routers.
    """

    num_layers: int = -1
    keys: Collection[str] | None = None
    rule: LoRARule = field(default_factory=LoRARule)

    def __post_init__(self) -> None:
        if isinstance(self.keys, str):
            raise ConfigError(f"keys is the string {self.keys!r}; expected a list of paths")
        if self.keys is not None:
            object.__setattr__(self, "keys", tuple(dict.fromkeys(self.keys)))
        check_fields(
            self,
            num_layers=(int, lambda x: x == -1 or x > 0, "a whole number above 0, or -1 (all)"),
            keys=(tuple | None, lambda x: x is None or len(x) > 0, "paths, or None (all)"),
        )

    @property
    def rules(self) -> Sequence[LoRARule]:
        return (self.rule,)

    def assign(self, layout: ModelLayout) -> dict[str, LoRARule]:
        first = self._first_block(layout)
        if self.keys is not None:
            return dict.fromkeys(self._by_keys(layout, first, self.keys), self.rule)
        return {
            path: self.rule
            for path, site in layout.sites.items()
            if site.block is not None and site.block >= first and not site.by_name
        }

    def rule_for(self, path: str) -> LoRARule:
        return self.rule

    def with_dropout(self, dropout: float) -> "LastBlocks":
        return replace(self, rule=replace(self.rule, dropout=dropout))

    def _first_block(self, layout: ModelLayout) -> int:
        depth = layout.depth()
        if self.num_layers > depth:
            raise AdapterError(
                f"num_layers is {self.num_layers}, the model has {depth} blocks; "
                f"expected 1 to {depth}, or -1 for all"
            )
        return 0 if self.num_layers == -1 else depth - self.num_layers

    def _by_keys(self, layout: ModelLayout, first: int, keys: Collection[str]) -> list[str]:
        found: list[str] = []
        problems: list[str] = []
        blocks = (layout.blocks or ())[first:]
        for key in keys:
            paths = [key, *(f"{block}.{key}" for block in blocks)]
            found += [path for path in paths if path in layout.sites]
            wrong = [path for path in paths if path in layout.others]
            problems += [f"{path!r} is {layout.others[path]}" for path in wrong]
            if not wrong and not any(path in layout.sites for path in paths):
                near = layout.nearest(key, short=True)
                problems.append(f"{key!r} matches nothing; nearest: {near}")
        if problems:
            raise AdapterError(
                "keys do not fit the model; expected paths of linear, embedding or expert layers, "
                "such as 'self_attn.q_proj'\n  " + "\n  ".join(problems)
            )
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class RuleList:
    """The first rule that matches a module is its rule; the rest of the model stays as it is."""

    rules: Sequence[LoRARule]

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", tuple(self.rules))
        if not self.rules:
            raise ConfigError("rules is empty; expected at least one LoRARule")

    def assign(self, layout: ModelLayout) -> dict[str, LoRARule]:
        chosen: dict[str, int] = {}
        taken: dict[int, int] = {}
        for path, site in layout.sites.items():
            matching = [i for i, rule in enumerate(self.rules) if _rule_applies(rule, site)]
            if matching:
                chosen[path] = matching[0]
                taken |= dict.fromkeys(matching[1:], matching[0])
        if unused := sorted(set(range(len(self.rules))) - set(chosen.values())):
            lines = [self._why_unused(i, taken.get(i), layout) for i in unused]
            raise AdapterError("rules do not fit the model\n  " + "\n  ".join(lines))
        return {path: self.rules[i] for path, i in chosen.items()}

    def rule_for(self, path: str) -> LoRARule:
        return next(rule for rule in self.rules if rule.matches(path))

    def with_dropout(self, dropout: float) -> "RuleList":
        return replace(self, rules=[replace(rule, dropout=dropout) for rule in self.rules])

    def _why_unused(self, index: int, before: int | None, layout: ModelLayout) -> str:
        rule = self.rules[index]
        words = f"rule {index} ({rule.module_path!r})"
        if before is not None:
            return (
                f"{words} never applies: rule {before} ({self.rules[before].module_path!r}) comes "
                "first everywhere it matches; put the narrower rule first"
            )
        if unnamed := next((path for path in layout.sites if rule.matches(path)), None):
            name = layout.sites[unnamed].name
            return (
                f"{words} reaches {unnamed!r} only by a wildcard; embeddings, heads and routers "
                f"have to be named: write {name!r} in module_path"
            )
        if other := next((path for path in layout.others if rule.matches(path)), None):
            return f"{words} matches {other!r}, which is {layout.others[other]}"
        return (
            f"{words} matches nothing; nearest: {layout.nearest(plain_spelling(rule.module_path))}"
        )


def _rule_applies(rule: LoRARule, site: AdaptableModule) -> bool:
    """Whether the rule matches the site, and names it where it has to be named."""
    return rule.matches(site.path) and (not site.by_name or site.name in rule.module_path)


def plain_spelling(pattern: str) -> str:
    """The words of a regular expression, to compare its spelling with paths."""
    return re.sub(r"^(\.\*)?(\\\.)?|[\\^$*+?()|\[\]]", "", pattern).replace("/", ".")

"""Two ways to select modules: one rule for the last blocks, and a list of rules."""

import re
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from textpolicy.adapters.config.model_layout import ModelLayout
from textpolicy.adapters.config.rules import LoRARule
from textpolicy.errors import AdapterError, ConfigError
from textpolicy.types import check_fields


@dataclass(frozen=True, kw_only=True, slots=True)
class LastBlocks:
    """One rule for the last `num_layers` blocks; -1 means all blocks.

    A number above the number of blocks means all blocks too, with a warning. `keys` are exact
    paths, inside a block ("self_attn.q_proj") or in the whole model. None means every linear and
    expert layer of these blocks except routers.
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

    def assign_rules(self, layout: ModelLayout) -> dict[str, LoRARule]:
        """Return the rule of each selected module by path; raise if a key matches nothing."""
        first = self._first_block(layout)
        if self.keys is not None:
            return dict.fromkeys(self._match_keys(layout, first, self.keys), self.rule)
        return {
            path: self.rule
            for path, one in layout.adaptable.items()
            if one.block is not None and one.block >= first and not one.by_name
        }

    def rule_for(self, path: str) -> LoRARule:
        """Return the rule of a selected module."""
        return self.rule

    def with_dropout(self, dropout: float) -> "LastBlocks":
        return replace(self, rule=replace(self.rule, dropout=dropout))

    def _first_block(self, layout: ModelLayout) -> int:
        depth = layout.depth()
        if self.num_layers > depth:
            # Configs are shared between models of different depths. mlx-swift-lm adapts all blocks
            # there are.
            warnings.warn(
                f"num_layers is {self.num_layers}, and the model has {depth} blocks: all {depth} "
                "are adapted",
                stacklevel=2,
            )
        return 0 if self.num_layers == -1 else max(0, depth - self.num_layers)

    def _match_keys(self, layout: ModelLayout, first: int, keys: Collection[str]) -> list[str]:
        found: list[str] = []
        problems: list[str] = []
        blocks = (layout.blocks or ())[first:]
        for key in keys:
            paths = [key, *(f"{block}.{key}" for block in blocks)]
            matching = [path for path in paths if path in layout.adaptable]
            wrong = [path for path in paths if path in layout.others]
            found += matching
            problems += [f"{path!r} is {layout.others[path]}" for path in wrong]
            if not wrong and not matching:
                near = layout.nearest(key, keys=True)
                problems.append(f"{key!r} matches nothing; nearest: {near}")
        if problems:
            raise AdapterError(
                "The config's keys do not fit the model. A key is the path of a linear, embedding "
                "or expert layer, such as 'self_attn.q_proj'\n  " + "\n  ".join(problems)
            )
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class RuleList:
    """The first rule that matches a module applies to it. Modules without a rule stay unchanged."""

    rules: Sequence[LoRARule]

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", tuple(self.rules))
        if not self.rules:
            raise ConfigError("rules is empty; expected at least one LoRARule")

    def assign_rules(self, layout: ModelLayout) -> dict[str, LoRARule]:
        """Return the rule of each selected module by path; raise if a rule never applies."""
        chosen: dict[str, int] = {}
        preceded_by: dict[int, int] = {}
        for path, one in layout.adaptable.items():
            matching = [
                i
                for i, rule in enumerate(self.rules)
                if rule.matches(path) and (not one.by_name or one.name in rule.module_path)
            ]
            if matching:
                chosen[path] = matching[0]
                preceded_by |= dict.fromkeys(matching[1:], matching[0])
        if unused := sorted(set(range(len(self.rules))) - set(chosen.values())):
            lines = [self._why_unused(i, preceded_by.get(i), layout) for i in unused]
            raise AdapterError("The config's rules do not fit the model\n  " + "\n  ".join(lines))
        return {path: self.rules[i] for path, i in chosen.items()}

    def rule_for(self, path: str) -> LoRARule:
        """Return the rule of a selected module."""
        return next(rule for rule in self.rules if rule.matches(path))

    def with_dropout(self, dropout: float) -> "RuleList":
        return replace(self, rules=[replace(rule, dropout=dropout) for rule in self.rules])

    def _why_unused(self, index: int, first: int | None, layout: ModelLayout) -> str:
        rule = self.rules[index]
        words = f"rule {index} ({rule.module_path!r})"
        if first is not None:
            return (
                f"{words} never applies: rule {first} ({self.rules[first].module_path!r}) comes "
                "first everywhere it matches; put the narrower rule first"
            )
        if unnamed := next((path for path in layout.adaptable if rule.matches(path)), None):
            name = layout.adaptable[unnamed].name
            return (
                f"{words} matches {unnamed!r} only by a wildcard; embeddings, heads and routers "
                f"must be named: write {name!r} in module_path"
            )
        if other := next((path for path in layout.others if rule.matches(path)), None):
            return f"{words} matches {other!r}, which is {layout.others[other]}"
        near = layout.nearest(strip_expression(rule.module_path))
        return f"{words} matches nothing; nearest: {near}"


def strip_expression(pattern: str) -> str:
    """Return a regular expression without its special characters, to find paths spelled like it."""
    return re.sub(r"^(\.\*)?(\\\.)?|[\\^$*+?()|\[\]]", "", pattern).replace("/", ".")

"""AdapterConfig: which modules of a model get which adapter."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from textpolicy.adapters.config import json_formats
from textpolicy.adapters.config.json_formats import Selection
from textpolicy.adapters.config.rules import AdapterKind, LoRARule
from textpolicy.adapters.config.selection import LastBlocks, RuleList
from textpolicy.errors import ConfigError


@dataclass(frozen=True, init=False, slots=True)
class AdapterConfig:
    """A list of `rules`, or the options of one rule with `num_layers` and `keys`.

    Without arguments the config is LoRA on every linear layer of every block. `from_dict` reads
    configs of other libraries. The defaults are those of `LastBlocks` and `LoRARule`.
    """

    selection: Selection

    def __init__(
        self,
        *,
        rules: Sequence[LoRARule] | None = None,
        num_layers: int | None = None,
        keys: Collection[str] | None = None,
        kind: AdapterKind | None = None,
        rank: int | None = None,
        scale: float | None = None,
        alpha: float | None = None,
        dropout: float | None = None,
    ) -> None:
        options = {"kind": kind, "rank": rank, "scale": scale, "alpha": alpha, "dropout": dropout}
        options = {name: value for name, value in options.items() if value is not None}
        where = {} if num_layers is None else {"num_layers": num_layers}
        if rules is None:
            rule = LoRARule(**cast(Any, options))
            selection = LastBlocks(**where, keys=keys, rule=rule)
        elif given := [*options, *where, *(["keys"] if keys is not None else [])]:
            raise ConfigError(
                f"rules are given together with {given}. Put these options into the rules"
            )
        else:
            selection = RuleList(rules=rules)
        object.__setattr__(self, "selection", selection)

    @classmethod
    def from_selection(cls, selection: Selection) -> "AdapterConfig":
        """Return the config that selects modules in this way."""
        config = cls.__new__(cls)
        object.__setattr__(config, "selection", selection)
        return config

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "AdapterConfig":
        """Read rules, an adapter_config.json of mlx-lm, mlx-swift-lm or PEFT, or plain options.

        Raise ConfigError for an option that is unknown or not supported.
        """
        return cls.from_selection(json_formats.read_selection(data))

    @classmethod
    def from_peft(cls, data: Mapping[str, Any], *, trained: bool = False) -> "AdapterConfig":
        """Read PEFT's adapter_config.json.

        With `trained`, the weights come with the config, so the option that says how to draw new
        weights is ignored unless it changed the base.
        """
        return cls.from_selection(json_formats.read_peft_config(data, trained=trained))

    def to_dict(self) -> dict[str, Any]:
        """Return JSON that `from_dict` reads back as an equal config."""
        return json_formats.write_selection(self.selection)

    @property
    def rules(self) -> Sequence[LoRARule]:
        """Every rule that a module can get."""
        return self.selection.rules

    @property
    def quantization_rules(self) -> list[LoRARule]:
        """The rules that add no adapter and may quantize the base."""
        return [rule for rule in self.rules if rule.kind == "none"]

    @property
    def dropout(self) -> float:
        """The largest dropout of any rule."""
        return max(rule.dropout for rule in self.rules)

    def with_dropout(self, dropout: float) -> "AdapterConfig":
        """Return the same config with this dropout in every rule."""
        return AdapterConfig.from_selection(self.selection.with_dropout(dropout))


def config_for_modules(
    rules: Mapping[str, LoRARule], more_rules: Iterable[LoRARule] = ()
) -> AdapterConfig:
    """Return a config of rules that name each module by its whole path, then `more_rules`.

    Modules with equal rules share one rule.
    """
    paths: dict[tuple[object, ...], list[str]] = {}
    shared: dict[tuple[object, ...], LoRARule] = {}
    for path, rule in rules.items():
        unnamed = replace(rule, module_path=".*")
        values = tuple(getattr(unnamed, name) for name in unnamed.__slots__)
        shared[values] = unnamed
        paths.setdefault(values, []).append(re.escape(path))
    named = [replace(rule, module_path="|".join(paths[key])) for key, rule in shared.items()]
    return AdapterConfig(rules=[*named, *more_rules])

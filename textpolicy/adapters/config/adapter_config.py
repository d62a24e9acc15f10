"""AdapterConfig: which modules of a model get which adapter, and finding these modules."""

import re
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import mlx.nn as nn

from textpolicy.adapters.config import json_formats
from textpolicy.adapters.config.json_formats import Selection
from textpolicy.adapters.config.model_layout import read_model_layout
from textpolicy.adapters.config.rules import AdapterKind, LoRARule
from textpolicy.adapters.config.selection import LastBlocks, RuleList
from textpolicy.adapters.quantization.stored_weights import ModuleKind
from textpolicy.errors import AdapterError, ConfigError


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
        with _odd_values_as_config_errors():
            return cls.from_selection(json_formats.read_selection(data))

    @classmethod
    def from_peft(cls, data: Mapping[str, Any], *, trained: bool = False) -> "AdapterConfig":
        """Read PEFT's adapter_config.json.

        With `trained`, the weights come with the config, so the option that says how to draw new
        weights is ignored unless it changed the base.
        """
        with _odd_values_as_config_errors():
            return cls.from_selection(json_formats.read_peft_config(data, trained=trained))

    def to_dict(self) -> dict[str, Any]:
        """Return JSON that `from_dict` reads back as an equal config."""
        return json_formats.write_selection(self.selection)

    @property
    def rules(self) -> Sequence[LoRARule]:
        """Every rule that can apply to a module."""
        return self.selection.rules

    @property
    def quantize_only_rules(self) -> list[LoRARule]:
        """The rules that add no adapter and may quantize the base."""
        return [rule for rule in self.rules if rule.kind == "none"]

    @property
    def dropout(self) -> float:
        """The largest dropout of any rule."""
        return max(rule.dropout for rule in self.rules)

    def with_dropout(self, dropout: float) -> "AdapterConfig":
        """Return the same config with this dropout in every rule."""
        return AdapterConfig.from_selection(self.selection.with_dropout(dropout))


@contextmanager
def _odd_values_as_config_errors() -> Generator[None]:
    """Turn the errors of values of a wrong kind, such as a number for a list, into ours."""
    try:
        yield
    except (TypeError, AttributeError, LookupError, ArithmeticError) as error:
        raise ConfigError(
            f"the adapter config has a value of a wrong kind: {error!s}. Write the config again "
            "with the library that made it"
        ) from error


def config_for_modules(
    rules: Mapping[str, LoRARule], more_rules: Iterable[LoRARule] = ()
) -> AdapterConfig:
    """Return a config of rules that name each module by its whole path, then `more_rules`.

    Modules with equal rules share one rule.
    """
    paths: dict[LoRARule, list[str]] = {}
    for path, rule in rules.items():
        paths.setdefault(replace(rule, module_path=".*"), []).append(re.escape(path))
    named = [replace(rule, module_path="|".join(some)) for rule, some in paths.items()]
    return AdapterConfig(rules=[*named, *more_rules])


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetModule:
    """A module that a config selects, and the rule that applies to it."""

    module: nn.Module
    kind: ModuleKind
    rule: LoRARule


def find_target_modules(model: nn.Module, config: AdapterConfig) -> dict[str, TargetModule]:
    """Return the modules that a config selects by path, first block first.

    Modules whose rule has kind "none" are included. Raise AdapterError if a rule or a name in the
    config matches nothing.
    """
    modules = dict(model.named_modules())
    _refuse_adapted_model(modules)
    layout = read_model_layout(model)
    rules = config.selection.assign_rules(layout)
    targets = {
        path: TargetModule(module=modules[path], kind=one.kind, rule=rules[path])
        for path, one in layout.adaptable.items()
        if path in rules
    }
    if not targets:
        raise AdapterError(
            f"There is nothing to adapt in {layout.model}: the config selects none of its "
            f"{len(layout.adaptable)} linear, embedding and expert layers"
        )
    _refuse_dora_experts(targets)
    return targets


def _refuse_adapted_model(modules: Mapping[str, nn.Module]) -> None:
    adapted = [path for path, module in modules.items() if "lora_a" in module]
    if adapted:
        raise AdapterError(
            f"The model already has adapters ({min(adapted)} and {len(adapted) - 1} more). To "
            "replace them, call AdapterContainer.of(model).unload() first. To give them other "
            "weights, call swap() on the container"
        )


def _refuse_dora_experts(targets: Mapping[str, TargetModule]) -> None:
    experts = [
        path
        for path, target in targets.items()
        if target.kind == "experts" and target.rule.kind == "dora"
    ]
    if experts:
        raise AdapterError(
            f"A rule asks for DoRA on {experts[0]} and {len(experts) - 1} more, but expert layers "
            "take LoRA only: DoRA would measure the weights of every expert for every batch. Name "
            "the other layers, or put a rule of kind 'lora' for the experts first"
        )

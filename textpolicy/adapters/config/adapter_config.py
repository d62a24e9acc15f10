"""What to adapt, and how: rules, or the words that stand for rules."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from textpolicy.adapters.config import json_formats
from textpolicy.adapters.config.rules import AdapterKind, LoRARule
from textpolicy.adapters.config.selection import LastBlocks, RuleList, Selection
from textpolicy.errors import ConfigError


@dataclass(frozen=True, init=False, slots=True)
class AdapterConfig:
    """Made of `rules`, or of one rule's words for the last `num_layers` blocks and their `keys`.

    Without arguments it is LoRA on every linear layer of every block. The words of other libraries
    are read by `from_dict`. Defaults are those of `LastBlocks` and `LoRARule`.
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
        rule = {"kind": kind, "rank": rank, "scale": scale, "alpha": alpha, "dropout": dropout}
        rule = {name: value for name, value in rule.items() if value is not None}
        where = {} if num_layers is None else {"num_layers": num_layers}
        if rules is None:
            made = LoRARule(**cast(Any, rule))
            selection = LastBlocks(**where, keys=keys, rule=made)
        elif given := [*rule, *where, *(["keys"] if keys is not None else [])]:
            raise ConfigError(f"rules are given beside {given}; say it inside the rules")
        else:
            selection = RuleList(rules=rules)
        object.__setattr__(self, "selection", selection)

    @classmethod
    def of(cls, selection: Selection) -> "AdapterConfig":
        """The config of a selection made elsewhere."""
        config = cls.__new__(cls)
        object.__setattr__(config, "selection", selection)
        return config

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "AdapterConfig":
        """Read rules, or the adapter_config.json of mlx-lm, mlx-swift-lm or PEFT, or plain options.

        What the form does not know, or cannot be honoured here, is refused.
        """
        return cls.of(json_formats.read_selection(data))

    @classmethod
    def from_peft(cls, data: Mapping[str, Any], *, trained: bool = False) -> "AdapterConfig":
        """Read PEFT's adapter_config.json; `trained` says that the weights come with it.

        How fresh weights would have been drawn then does not matter, unless it changed the base.
        """
        return cls.of(json_formats.read_peft_config(data, trained=trained))

    def to_dict(self) -> dict[str, Any]:
        """JSON in the form of its words: `from_dict` reads an equal config back."""
        return json_formats.write_selection(self.selection)

    @property
    def rules(self) -> Sequence[LoRARule]:
        """All that a module may get."""
        return self.selection.rules

    @property
    def dropout(self) -> float:
        """The largest dropout of any rule."""
        return max(rule.dropout for rule in self.rules)

    def with_dropout(self, dropout: float) -> "AdapterConfig":
        """The same config but for the dropout, which is then that of every rule."""
        return AdapterConfig.of(self.selection.with_dropout(dropout))

"""What to adapt, and how strongly: the one place where adapter defaults live."""

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from typing import Any

from textpolicy.errors import ConfigError
from textpolicy.types import check_fields


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterConfig:
    """LoRA on the linear layers of the last `num_layers` blocks; -1 is all blocks.

    `scale` multiplies the low-rank product. `keys` are exact paths, either inside a block
    ("self_attn.q_proj") or in the whole model; None is every linear layer of the blocks.
    """

    num_layers: int = -1
    rank: int = 16
    scale: float = 2.0
    dropout: float = 0.0
    keys: Collection[str] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.keys, str):
            raise ConfigError(f"keys is the string {self.keys!r}; expected a list of paths")
        if self.keys is not None:
            object.__setattr__(self, "keys", tuple(dict.fromkeys(self.keys)))
        check_fields(
            self,
            num_layers=(int, lambda x: x == -1 or x > 0, "a whole number above 0, or -1 (all)"),
            rank=(int, lambda x: x > 0, "a whole number above 0"),
            scale=(int | float, lambda x: math.isfinite(x) and x != 0, "finite and not 0"),
            dropout=(int | float, lambda x: 0 <= x < 1, "a number in [0, 1)"),
            keys=(tuple | None, lambda x: x is None or len(x) > 0, "paths, or None (all)"),
        )

    @classmethod
    def from_mlx(cls, data: Mapping[str, Any]) -> "AdapterConfig":
        """Read the form of mlx-lm's adapter_config.json; unknown fields are refused."""
        check_options("adapter config", data, ["fine_tune_type", "num_layers", "lora_parameters"])
        if (kind := data.get("fine_tune_type", "lora")) != "lora":
            raise ConfigError(f"fine_tune_type is {kind!r}; expected 'lora'")
        parameters = data.get("lora_parameters", {})
        known = [field.name for field in fields(cls) if field.name != "num_layers"]
        check_options("lora_parameters", parameters, known)
        layers = {"num_layers": data["num_layers"]} if "num_layers" in data else {}
        return cls(**layers, **parameters)

    def to_mlx(self) -> dict[str, Any]:
        """The form of mlx-lm's adapter_config.json."""
        parameters = asdict(self)
        num_layers = parameters.pop("num_layers")
        if self.keys is None:
            del parameters["keys"]
        return {
            "fine_tune_type": "lora",
            "num_layers": num_layers,
            "lora_parameters": parameters,
        }


def check_options(what: str, given: Mapping[str, Any], known: Collection[str]) -> None:
    """Refuse options that nobody reads, naming the nearest that somebody does."""
    if unknown := sorted(set(given) - set(known)):
        near = [near for name in unknown for near in get_close_matches(name, known, n=1)]
        hint = f"; did you mean {near}?" if near else ""
        raise ConfigError(f"unknown {what} options {unknown}; known: {list(known)}{hint}")

"""One rule: which modules, what stands beside them, and how many bits they keep."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass
from typing import Literal, cast

import mlx.core as mx

from textpolicy.adapters.quantization.number_formats import NumberFormat, format_by_name
from textpolicy.errors import AdapterError, ConfigError
from textpolicy.types import check_fields

AdapterKind = Literal["lora", "dora", "none"]
_KINDS = ("lora", "dora", "none")
Initialiser = str | Callable[[Sequence[int], mx.array], mx.array]
"""A name, or a function of a shape and a random key."""

_UNSET = cast(float, None)
_DEFAULT_SCALE = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class LoRARule:
    """`module_path` is a regular expression that matches a whole path, dotted or with "/".

    Modules outside the blocks (embeddings, output head) and routers of experts are matched only by
    a `module_path` in which their own name is written out, so ".*" is every linear layer of the
    blocks. `kind` "none" adapts nothing: with `weight_qtype` the rule only quantizes, without it
    the modules are left alone. Give `scale`, or `alpha` as other libraries do: it becomes
    alpha / rank, or alpha / sqrt(rank) with `rslora`. `tile_size` is how many weights of a row
    share a scale; None is the usual one of `weight_qtype`, "channel" the whole row (nf4 only).
    `bias` adds a trainable offset to what the module computes.
    """

    module_path: str = ".*"
    kind: AdapterKind = "lora"
    rank: int = 16
    scale: float = _UNSET
    alpha: InitVar[float | None] = None
    rslora: InitVar[bool] = False
    dropout: float = 0.0
    a_init: Initialiser = "uniform"
    b_init: Initialiser = "zeros"
    weight_qtype: str | None = None
    tile_size: int | Literal["channel"] | None = None
    bias: bool = False

    def __post_init__(self, alpha: float | None, rslora: bool) -> None:
        check_fields(
            self,
            module_path=(str, bool, "a regular expression for paths of modules"),
            kind=(str, _KINDS.__contains__, f"one of {list(_KINDS)}"),
            rank=(int, lambda x: x > 0, "a whole number above 0"),
            dropout=(int | float, lambda x: 0 <= x < 1, "a number in [0, 1)"),
            bias=(bool, lambda _: True, "True or False"),
        )
        object.__setattr__(self, "scale", _scale(self, alpha, rslora))
        number = (int | float, lambda x: math.isfinite(x) and x != 0, "finite and not 0")
        check_fields(self, scale=number)
        for name in ("a_init", "b_init"):
            _check_initialiser(name, getattr(self, name))
        try:
            re.compile(self.module_path)
        except re.error as error:
            raise ConfigError(
                f"module_path is {self.module_path!r}, no regular expression: {error}"
            ) from error
        if self.weight_qtype is None and self.tile_size is not None:
            raise ConfigError(f"tile_size is {self.tile_size!r} without a weight_qtype to tile")
        _ = self.number_format

    @property
    def number_format(self) -> NumberFormat | None:
        """What the rule quantizes to, or None."""
        if self.weight_qtype is None:
            return None
        return format_by_name(self.weight_qtype, self.tile_size)

    def matches(self, path: str) -> bool:
        """Whether the whole of a dotted path is meant, written with dots or with "/"."""
        return any(re.fullmatch(self.module_path, form) for form in (path, path.replace(".", "/")))


def _scale(rule: LoRARule, alpha: float | None, rslora: bool) -> float:
    given = cast(float | None, rule.scale)
    if alpha is None:
        if rslora:
            raise ConfigError("rslora says how alpha becomes a scale, and there is no alpha")
        return _DEFAULT_SCALE if given is None else given
    if given is not None:
        raise ConfigError(f"both scale ({given}) and alpha ({alpha}) are given; expected one")
    return alpha / (math.sqrt(rule.rank) if rslora else rule.rank)


# Each is a distribution and its half width or standard deviation for so many inputs and ranks.
_INITIALISERS: dict[str, tuple[str, Callable[[int, int], float]]] = {
    "uniform": ("uniform", lambda inputs, _: 1 / math.sqrt(inputs)),
    "he_uniform": ("uniform", lambda inputs, _: math.sqrt(6 / inputs)),
    "gaussian": ("normal", lambda _, rank: 1 / rank),
    "zeros": ("zeros", lambda _inputs, _rank: 0.0),
}


def draw_initial_array(
    initialiser: Initialiser, shape: Sequence[int], *, inputs: int, rank: int, key: mx.array
) -> mx.array:
    """A float32 array drawn from `key`."""
    if isinstance(initialiser, str):
        distribution, size = _INITIALISERS[initialiser]
        spread = size(inputs, rank)
        if distribution == "uniform":
            return mx.random.uniform(-spread, spread, shape, key=key)
        if distribution == "normal":
            return mx.random.normal(shape, scale=spread, key=key)
        return mx.zeros(shape)
    drawn = initialiser(shape, key)
    if drawn.shape != tuple(shape):
        raise AdapterError(
            f"an initialiser returned an array of {drawn.shape}; expected {tuple(shape)}"
        )
    return drawn.astype(mx.float32)


def _check_initialiser(name: str, initialiser: Initialiser) -> None:
    if not callable(initialiser) and initialiser not in _INITIALISERS:
        raise ConfigError(
            f"{name} is {initialiser!r}; expected one of {list(_INITIALISERS)}, or a function of "
            "a shape and a random key"
        )

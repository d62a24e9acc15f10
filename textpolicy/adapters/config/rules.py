"""LoRARule: which modules to adapt, with which kind of adapter, and how to quantize them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass
from typing import Literal, cast, get_args

import mlx.core as mx

from textpolicy.adapters.quantization.number_formats import NumberFormat, format_by_name
from textpolicy.errors import AdapterError, ConfigError
from textpolicy.types import check_fields
from textpolicy.untrusted.patterns import check_pattern, match_pattern

AdapterKind = Literal["lora", "dora", "none"]
Initializer = str | Callable[[Sequence[int], mx.array], mx.array]
"""A name, or a function of a shape and a random key."""

_KINDS = get_args(AdapterKind)
_INITIALIZERS = ("uniform", "he_uniform", "gaussian", "zeros")
_UNSET = cast(float, None)
_DEFAULT_SCALE = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class LoRARule:
    """`module_path` is a regular expression for a whole module path, with dots or with "/".

    Modules outside the blocks (embeddings, output head) and routers of experts match only if
    `module_path` contains their own name, so ".*" means every linear layer of the blocks. Kind
    "none" adds no adapter: with `weight_qtype` the rule only quantizes, without it the modules stay
    unchanged. Give either `scale`, or `alpha` as other libraries do: the scale is then
    alpha / rank, or alpha / sqrt(rank) with `rslora`. With `bias`, the adapter trains a bias of the
    module's output too.

    `tile_size` is the number of weights of a row that share a quantization scale; "channel" is the
    whole row (nf4 only). None is the default of `weight_qtype`, or where a row does not divide into
    such tiles, the next size that fits.
    """

    module_path: str = ".*"
    kind: AdapterKind = "lora"
    rank: int = 16
    scale: float = _UNSET
    alpha: InitVar[float | None] = None
    rslora: InitVar[bool] = False
    dropout: float = 0.0
    a_init: Initializer = "uniform"
    b_init: Initializer = "zeros"
    weight_qtype: str | None = None
    tile_size: int | Literal["channel"] | None = None
    bias: bool = False

    def __post_init__(self, alpha: float | None, rslora: bool) -> None:
        check_fields(
            self,
            module_path=(str, bool, "a regular expression for module paths"),
            kind=(str, _KINDS.__contains__, f"one of {list(_KINDS)}"),
            rank=(int, lambda x: x > 0, "a whole number above 0"),
            dropout=(int | float, lambda x: 0 <= x < 1, "a number in [0, 1)"),
            bias=(bool, lambda _: True, "True or False"),
        )
        object.__setattr__(self, "scale", _scale_of(self, alpha, rslora))
        number = (int | float, lambda x: math.isfinite(x) and x != 0, "a finite number, not 0")
        check_fields(self, scale=number)
        for name, initializer in (("a_init", self.a_init), ("b_init", self.b_init)):
            if not callable(initializer) and initializer not in _INITIALIZERS:
                raise ConfigError(
                    f"{name} is {initializer!r}; expected one of {list(_INITIALIZERS)}, or a "
                    "function of a shape and a random key"
                )
        try:
            check_pattern(self.module_path)
        except ValueError as error:
            raise ConfigError(
                f"module_path is {self.module_path!r}, which is not a regular expression: {error}"
            ) from error
        if self.weight_qtype is None and self.tile_size is not None:
            raise ConfigError(
                f"tile_size is {self.tile_size!r} without a weight_qtype. Set weight_qtype too, or "
                "leave tile_size out"
            )
        # A wrong weight_qtype or tile_size raises now.
        _ = self.number_format

    @property
    def number_format(self) -> NumberFormat | None:
        """The number format that the rule quantizes to, or None."""
        if self.weight_qtype is None:
            return None
        return format_by_name(self.weight_qtype, self.tile_size)

    def format_for(self, row: int) -> NumberFormat | None:
        """Return the number format of a weight with rows of this length, or None.

        Without a `tile_size`, a size that divides the rows is chosen if there is one.
        """
        chosen = self.number_format
        return chosen.fitted_to(row) if chosen and self.tile_size is None else chosen

    def matches(self, path: str) -> bool:
        """Return whether `module_path` matches a whole dotted path, with dots or with "/"."""
        return any(
            match_pattern(self.module_path, one, whole=True)
            for one in (path, path.replace(".", "/"))
        )


def _scale_of(rule: LoRARule, alpha: float | None, rslora: bool) -> float:
    given = cast(float | None, rule.scale)
    if alpha is None:
        if rslora:
            raise ConfigError(
                "rslora is True, but there is no alpha for it to divide by sqrt(rank). Give alpha, "
                "or give scale without rslora"
            )
        return _DEFAULT_SCALE if given is None else given
    if given is not None:
        raise ConfigError(f"both scale ({given}) and alpha ({alpha}) are given; give only one")
    return alpha / (math.sqrt(rule.rank) if rslora else rule.rank)


def draw_initial_array(
    initializer: Initializer, shape: Sequence[int], *, inputs: int, rank: int, key: mx.array
) -> mx.array:
    """Return a float32 array drawn from `key`."""
    if initializer == "zeros":
        return mx.zeros(shape)
    if initializer == "gaussian":
        return mx.random.normal(shape, scale=1 / rank, key=key)
    if isinstance(initializer, str):
        bound = 1 / math.sqrt(inputs) if initializer == "uniform" else math.sqrt(6 / inputs)
        return mx.random.uniform(-bound, bound, shape, key=key)
    drawn = initializer(shape, key)
    if drawn.shape != tuple(shape):
        raise AdapterError(
            f"An initializer returned an array of shape {drawn.shape}; expected {tuple(shape)}"
        )
    return drawn.astype(mx.float32)

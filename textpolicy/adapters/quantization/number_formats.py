"""In what form weights are stored: the modes of mlx, NF4, and the names that rules use."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Literal

from textpolicy.errors import ConfigError

WHOLE_ROW = -1
"""The group size that is the whole row."""

_AFFINE_GROUPS = (32, 64, 128)
# Bits and group sizes of each mode; the first group size is the usual one.
_MODES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": ((2, 3, 4, 5, 6, 8), (64, 32, 128)),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
    "nf4": ((4,), (64, 32, 128, WHOLE_ROW)),
}
_REFUSED_BITS = {
    1: "its error is larger than that of all weights set to zero",
    7: "mlx has no kernels for it",
}
QTYPES = {f"int{bits}": ("affine", bits) for bits in _MODES["affine"][0]} | {
    mode: (mode, bits[0]) for mode, (bits, _) in _MODES.items() if mode != "affine"
}
"""The names of formats in rules: int4 and its like are affine, so not symmetric."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NumberFormat:
    """`group_size` weights of a row share one scale; None is the usual number for the mode."""

    bits: int = 4
    group_size: int | None = None
    mode: str = "affine"

    def __post_init__(self) -> None:
        if self.mode not in _MODES:
            raise ConfigError(f"quantization mode is {self.mode!r}; expected one of {list(_MODES)}")
        known_bits, known_groups = _MODES[self.mode]
        if self.bits not in known_bits:
            reason = f" ({_REFUSED_BITS[self.bits]})" if self.bits in _REFUSED_BITS else ""
            raise ConfigError(
                f"bits is {self.bits}{reason}; mode {self.mode!r} has {list(known_bits)}"
            )
        if self.group_size is None:
            object.__setattr__(self, "group_size", known_groups[0])
        elif self.group_size not in known_groups:
            raise ConfigError(
                f"group_size is {self.group_size}; mode {self.mode!r} has {sorted(known_groups)}"
            )

    @property
    def name(self) -> str:
        """As rules name it."""
        return f"int{self.bits}" if self.mode == "affine" else self.mode

    def misfit(self, row: int) -> str | None:
        """Why rows of this length cannot be stored so, or None."""
        if self.group_size == WHOLE_ROW:
            return f"rows of {row} do not pack into bytes of two weights" if row % 2 else None
        if self.group_size and row % self.group_size:
            return f"rows of {row} do not divide into groups of {self.group_size}"
        return None

    def stored_bytes(self, shape: Sequence[int], itemsize: int) -> int:
        """What a weight of this shape takes, packed from floats of `itemsize` bytes."""
        count, row = prod(shape), shape[-1]
        group = row if self.group_size == WHOLE_ROW else (self.group_size or row)
        # Affine groups have a scale and a bias, mx groups a scale in one byte.
        scale = {"affine": 2 * itemsize, "nf4": itemsize}.get(self.mode, 1)
        return count * self.bits // 8 + count // group * scale

    def options(self) -> dict[str, int | str]:
        """The arguments of `quantize`."""
        return asdict(self)


def format_by_name(
    weight_qtype: str, tile_size: int | Literal["channel"] | None = None
) -> NumberFormat:
    """The format that a rule names."""
    if weight_qtype not in QTYPES:
        known = [*QTYPES]
        reason = _refusal(weight_qtype)
        raise ConfigError(f"weight_qtype is {weight_qtype!r}{reason}; expected one of {known}")
    mode, bits = QTYPES[weight_qtype]
    if tile_size == "channel":
        tile_size = WHOLE_ROW
    try:
        return NumberFormat(bits=bits, group_size=tile_size, mode=mode)
    except ConfigError as error:
        groups = ["channel" if size == WHOLE_ROW else size for size in _MODES[mode][1]]
        raise ConfigError(f"tile_size is {tile_size!r}; {weight_qtype!r} has {groups}") from error


def _refusal(weight_qtype: str) -> str:
    bits = weight_qtype.removeprefix("int")
    reason = _REFUSED_BITS.get(int(bits)) if bits.isdigit() else None
    return f" ({reason})" if reason else ""

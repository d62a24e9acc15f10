"""The number formats of quantized weights: the modes of mlx, NF4, and the names that rules use."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Literal

from textpolicy.errors import ConfigError

WHOLE_ROW = -1
"""The group size that stands for the whole row."""

# Bits and group sizes of each mode. The first group size is the default.
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
"""Mode and bits of each format name in rules. "int4" and its like are affine, not symmetric."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NumberFormat:
    """`group_size` weights of a row share one scale. None is the default of the mode."""

    bits: int = 4
    group_size: int | None = None
    mode: str = "affine"

    def __post_init__(self) -> None:
        if self.mode not in _MODES:
            raise ConfigError(f"quantization mode is {self.mode!r}; expected one of {list(_MODES)}")
        known_bits, known_groups = _MODES[self.mode]
        if self.bits not in known_bits:
            raise ConfigError(
                f"bits is {self.bits}{_refusal(self.bits)}; mode {self.mode!r} takes "
                f"{list(known_bits)}"
            )
        if self.group_size is None:
            object.__setattr__(self, "group_size", known_groups[0])
        elif self.group_size not in known_groups:
            raise ConfigError(
                f"group_size is {self.group_size}; mode {self.mode!r} takes {sorted(known_groups)}"
            )

    @property
    def name(self) -> str:
        """The name of the format in rules."""
        return f"int{self.bits}" if self.mode == "affine" else self.mode

    @property
    def tile(self) -> int | Literal["channel"] | None:
        """The `tile_size` of the format in rules."""
        return "channel" if self.group_size == WHOLE_ROW else self.group_size

    def row_problem(self, row: int) -> str | None:
        """Return why rows of this length cannot be stored in the format, or None."""
        if self.group_size == WHOLE_ROW:
            return f"rows of {row} do not pack into bytes of two weights" if row % 2 else None
        if self.group_size and row % self.group_size:
            return f"rows of {row} do not divide into groups of {self.group_size}"
        return None

    def fitted_to(self, row: int) -> "NumberFormat":
        """Return the format with the first group size of its mode that divides rows of this length.

        The group sizes are tried in order: the default of the mode, smaller ones, and the whole
        row. If none divides the rows, the format itself is returned.
        """
        formats = (replace(self, group_size=size) for size in _MODES[self.mode][1])
        return next((one for one in formats if one.row_problem(row) is None), self)

    def stored_bytes(self, shape: Sequence[int], itemsize: int) -> int:
        """Return the bytes of a packed weight of this shape, whose floats had `itemsize` bytes."""
        count, row = prod(shape), shape[-1]
        group = row if self.group_size == WHOLE_ROW else (self.group_size or row)
        # An affine group has a scale and a bias; an mx group has a scale of one byte.
        scale = {"affine": 2 * itemsize, "nf4": itemsize}.get(self.mode, 1)
        return count * self.bits // 8 + count // group * scale

    def options(self) -> dict[str, int | str]:
        """Return the arguments that `quantize` takes for this format."""
        return asdict(self)


def format_by_name(
    weight_qtype: str, tile_size: int | Literal["channel"] | None = None
) -> NumberFormat:
    """Return the format that a rule names."""
    if weight_qtype not in QTYPES:
        bits = weight_qtype.removeprefix("int")
        refusal = _refusal(int(bits)) if bits.isdigit() else ""
        raise ConfigError(f"weight_qtype is {weight_qtype!r}{refusal}; expected one of {[*QTYPES]}")
    mode, bits = QTYPES[weight_qtype]
    group_size = WHOLE_ROW if tile_size == "channel" else tile_size
    try:
        return NumberFormat(bits=bits, group_size=group_size, mode=mode)
    except ConfigError as error:
        groups = ["channel" if size == WHOLE_ROW else size for size in _MODES[mode][1]]
        raise ConfigError(f"tile_size is {tile_size!r}; {weight_qtype!r} takes {groups}") from error


def _refusal(bits: int) -> str:
    return f" ({_REFUSED_BITS[bits]})" if bits in _REFUSED_BITS else ""

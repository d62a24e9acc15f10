"""NF4 of QLoRA (https://arxiv.org/abs/2305.14314): 4 bits per weight, at quantiles of a normal.

Each weight is stored as the nearest of 16 levels times the largest magnitude of its group. Two
weights share a byte, and the first is in the upper half, as in bitsandbytes. mlx has no such mode,
so a product with NF4 weights is a table look-up and an ordinary product. The stored weights are
frozen: gradients flow to the inputs, and the backward pass unpacks the weights again.
"""

from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Float, Integer, UInt8

from textpolicy.adapters.quantization.number_formats import WHOLE_ROW
from textpolicy.adapters.quantization.packed_product import make_packed_product, packed_matrix
from textpolicy.fast_cpu.packed_weights import PackedMatrix

# The QLoRA paper's appendix E.
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
    0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
_BOUNDARIES = [(low + high) / 2 for low, high in pairwise(NF4_LEVELS)]


def pack_nf4(
    weight: Float[mx.array, "*rows in"], group_size: int = 64
) -> tuple[UInt8[mx.array, "*rows half"], Float[mx.array, "*rows groups"]]:
    """Return codes, two in a byte, and each group's largest magnitude in the weight's dtype."""
    size = weight.shape[-1] if group_size == WHOLE_ROW else group_size
    groups = mx.unflatten(weight, -1, (-1, size))
    scales = mx.abs(groups).max(axis=-1)
    divisor = mx.where(scales == 0, 1, scales).astype(mx.float32)
    relative = groups.astype(mx.float32) / divisor[..., None]
    codes = mx.zeros(groups.shape, mx.uint8)
    for boundary in _BOUNDARIES:
        codes = codes + (relative > boundary)
    codes = codes.flatten(-2)
    return (codes[..., 0::2] << 4) | codes[..., 1::2], scales


def unpack_nf4(
    weight: UInt8[mx.array, "*rows half"], scales: Float[mx.array, "*rows groups"]
) -> Float[mx.array, "*rows in"]:
    """Return the float32 weights that the codes stand for."""
    levels = mx.array(NF4_LEVELS)
    pairs = mx.stack([mx.repeat(levels, 16), mx.tile(levels, 16)], axis=-1)
    # The two levels of every byte as one 64-bit value: one look-up finds both.
    values = pairs.view(mx.uint64).flatten()[weight].view(mx.float32)
    groups = mx.unflatten(values, -1, (scales.shape[-1], -1))
    return (groups * scales.astype(mx.float32)[..., None]).flatten(-2)


class NF4Module(nn.Module):
    """Frozen weights with 4 bits each: the base of the two layers below."""

    bits = 4
    mode = "nf4"

    def __init__(self, weight: Float[mx.array, "rows in"], group_size: int = 64) -> None:
        super().__init__()
        self.group_size = group_size
        self.weight, self.scales = pack_nf4(weight, group_size)
        self.freeze()


class NF4Linear(NF4Module):
    """A frozen linear layer with 4 bits per weight. `from_linear` makes one."""

    bias: mx.array

    @classmethod
    def from_linear(cls, linear: nn.Linear, group_size: int = 64) -> "NF4Linear":
        """Return the nearest NF4 layer, with the same bias."""
        made = cls(linear.weight, group_size)
        if "bias" in linear:
            made.bias = linear.bias
            made.freeze()
        return made

    def __call__(self, x: Float[mx.array, "*batch in"]) -> Float[mx.array, "*batch out"]:
        y = _multiply_nf4(x, self.weight, self.scales)
        return y + self.bias if "bias" in self else y

    def packed_matrix(self) -> PackedMatrix | None:
        """Return the weight, if compiled functions multiply with it as it is stored."""
        return packed_matrix(self)


class NF4Embedding(NF4Module):
    """A frozen embedding table with 4 bits per weight, usable as an output head (`as_linear`)."""

    def __call__(self, ids: Integer[mx.array, "*batch"]) -> Float[mx.array, "*batch features"]:
        return unpack_nf4(self.weight[ids], self.scales[ids]).astype(self.scales.dtype)

    def as_linear(
        self, x: Float[mx.array, "*batch features"]
    ) -> Float[mx.array, "*batch vocabulary"]:
        """Return the logits that the table gives as an output head."""
        return _multiply_nf4(x, self.weight, self.scales)


_multiply_nf4 = make_packed_product(unpack_nf4, NF4Module.mode, NF4Module.bits)

"""Blocks of Llama and Qwen that compute a decode step by one operation, on a Linux CPU.

In a decode step, mlx takes longer to begin the seventy operations of a block with LoRA than to
compute them. The function of `decoder_block.c` computes a block with all its layers, and adds the
new position to the cache. Other calls, and blocks with other layers, are computed by the block's
own code.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple, Protocol, runtime_checkable

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Float
from mlx_lm.models import llama, qwen2, qwen3

from textpolicy.fast_cpu.gradients import are_gradients_needed
from textpolicy.fast_cpu.mlx_operations import bits_of, compiled_operation, reason_of_none
from textpolicy.fast_cpu.packed_weights import MOST_ROWS
from textpolicy.fast_cpu.rms_norm import FastRMSNorm
from textpolicy.fast_cpu.rotary import FAST_ROTATIONS, Angles, FastRotation, next_positions
from textpolicy.fast_cpu.weight_values import weight_value

_States = Float[mx.array, "rows time width"]
_Position = Float[mx.array, "rows 1 width"]
_Shape = tuple[int, ...]

_PARTS: dict[type[nn.Module], tuple[type[nn.Module], type[nn.Module]]] = {
    models.TransformerBlock: (models.Attention, models.MLP) for models in (llama, qwen2, qwen3)
}
"""By their classes, the known blocks, each with the classes of its attention and its layers."""
_OF_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_OF_MLP = ("gate_proj", "up_proj", "down_proj")


@runtime_checkable
class StepCache(Protocol):
    """The keys and values of a layer, with memory for more positions.

    `used` positions are used, and `offset` has the next position of each row.
    """

    keys: mx.array
    values: mx.array
    offset: mx.array
    used: int

    def make_room(self, keys: _Shape, values: _Shape) -> None:
        """Have memory for one more position, whose keys and values have these shapes."""

    def take_step(self, keys: mx.array, values: mx.array, offset: mx.array) -> None:
        """Take over keys and values to which one position has been added, and the new offsets."""


class _Weights(NamedTuple):
    """The arrays of a layer's weights, and which of them have to be floats.

    `format_code` is four times the number of an output's groups plus the format, as `take_linear`
    in `decoder_block.c` reads it; 0 for floats.
    """

    inputs: int
    outputs: int
    arrays: list[mx.array]
    float_arrays: list[mx.array]
    format_code: int

    @classmethod
    def of(cls, layer: Any) -> "_Weights | None":
        """Return the weights of a linear layer, or None if its class computes something else."""
        if type(layer) is nn.Linear:
            outputs, inputs = layer["weight"].shape
            arrays = [layer["weight"]]
            return cls(inputs, outputs, arrays, arrays, 0)
        if "packed_matrix" not in vars(type(layer)) or (matrix := layer.packed_matrix()) is None:
            return None
        arrays, code = matrix.arrays, 4 * matrix.groups + matrix.format
        return cls(matrix.inputs, len(arrays[0]), arrays, arrays[1:], code)


class CompiledLinear(NamedTuple):
    """The arrays of a linear layer, perhaps with LoRA or DoRA, and its two codes.

    `take_linear` in `decoder_block.c` reads the codes.
    """

    inputs: int
    outputs: int
    arrays: list[mx.array]
    codes: tuple[int, int]

    @classmethod
    def of(cls, layer: Any) -> "CompiledLinear | None":
        """Return the arrays of a layer, or None if it computes something else.

        The functions in C trust the shapes, so arrays that do not fit together are refused here.
        """
        factors: list[mx.array] = []
        if "compiled_parts" in vars(type(layer)):
            if (known := layer.compiled_parts()) is None:
                return None
            layer, factors = known
        if (weights := _Weights.of(layer)) is None:
            return None
        inputs, outputs = weights.inputs, weights.outputs
        bias = [layer["bias"]] if "bias" in layer else []
        for one in (*weights.float_arrays, *bias, *factors):
            if one.dtype != mx.float32:
                return None
        # A, B and the scale of LoRA, and the ratio of DoRA.
        rank = factors[0].shape[1] if factors else 0
        if factors and (factors[0].shape[0], factors[1].shape) != (inputs, (rank, outputs)):
            return None
        for one in (*bias, *factors[3:]):
            if one.shape != (outputs,):
                return None
        codes = 4 * rank + 2 * (len(factors) > 3) + len(bias), weights.format_code
        return cls(inputs, outputs, [*weights.arrays, *bias, *factors], codes)

    @property
    def is_packed(self) -> bool:
        """Whether the weights are stored in few bits."""
        return self.codes[1] > 0


def faster_block(
    block: type[nn.Module], faster_class: Callable[[type[nn.Module]], type[nn.Module]]
) -> type[nn.Module] | None:
    """Return a subclass of a known block that computes a decode step by one compiled operation."""
    if block not in _PARTS:
        return None
    attention, layers = map(faster_class, _PARTS[block])
    plain: Any = block.__call__

    def call(self: Any, x: _States, mask: Any = None, cache: Any = None) -> _States:
        # To ask for a protocol by `isinstance` takes microseconds.
        is_step = x.shape[1] == 1 and hasattr(cache, "take_step") and not are_gradients_needed()
        if not is_step or not x.size or x.dtype != mx.float32:
            return plain(self, x, mask, cache)
        compiled = compiled_block(self)
        angles = compiled and compiled.angles(cache.offset)
        if not compiled or not angles or not compiled.takes(x, mask, cache.used + 1, angles):
            return plain(self, x, mask, cache)
        if not compiled.prepare(cache, len(x)):
            return plain(self, x, mask, cache)
        return compiled.compute(x, mask, cache, angles)

    def compiled_block(self: Any) -> _CompiledBlock | None:
        if mx.default_device().type != mx.cpu or reason_of_none():
            return None
        return weight_value(self, lambda: made_of_known_parts(self))

    def made_of_known_parts(self: Any) -> _CompiledBlock | None:
        known = type(self.self_attn) is attention and type(self.mlp) is layers
        return _CompiledBlock.of(self) if known else None

    names = {"__module__": block.__module__, "__qualname__": block.__qualname__}
    return type(block.__name__, (block,), names | {"__call__": call})


@dataclass(frozen=True)
class _CompiledBlock:
    """What the compiled function needs of a block: arrays and numbers, in the order it takes them.

    The arrays are those before the angles and those after them. `decoder_block.c` lists arrays and
    numbers.
    """

    rope: FastRotation
    hidden: int
    heads: int
    key_heads: int
    width: int
    value_width: int
    inner: int
    before: list[mx.array]
    after: list[mx.array]
    float_bits: list[int]
    has_head_norms: bool
    layer_codes: list[int]
    most_rows: float

    @classmethod
    def of(cls, block: Any) -> "_CompiledBlock | None":
        """Return the parts of a block, or None if the compiled function cannot compute it."""
        attention, mlp = block["self_attn"], block["mlp"]
        found = [CompiledLinear.of(attention[name]) for name in _OF_ATTENTION]
        found += [CompiledLinear.of(mlp[name]) for name in _OF_MLP]
        layers = [one for one in found if one is not None]
        head_norms = [attention[name] for name in ("q_norm", "k_norm") if name in attention]
        norms = [block["input_layernorm"], block["post_attention_layernorm"], *head_norms]
        for norm in norms:
            if type(norm) is not FastRMSNorm or norm["weight"].dtype != mx.float32:
                return None
        if len({norm.eps for norm in head_norms}) > 1 or len(layers) < len(found):
            return None
        rope = attention["rope"]
        if type(rope) not in FAST_ROTATIONS.values() or not _fit(block, layers, norms):
            return None
        q, k, v, o, gate, up, down = layers
        heads, key_heads = attention.n_heads, attention.n_kv_heads
        epsilons = [norm.eps for norm in norms]
        head_epsilon = epsilons[2] if head_norms else 0.0
        first_norm, second_norm, *of_heads = (norm["weight"] for norm in norms)
        return cls(
            rope=rope,
            hidden=q.inputs,
            heads=heads,
            key_heads=key_heads,
            width=q.outputs // heads,
            value_width=v.outputs // key_heads,
            inner=gate.outputs,
            before=[first_norm, *q.arrays, *k.arrays, *v.arrays, *of_heads],
            after=[*o.arrays, second_norm, *gate.arrays, *up.arrays, *down.arrays],
            float_bits=[*map(bits_of, (attention.scale, *epsilons[:2], head_epsilon))],
            has_head_norms=bool(head_norms),
            layer_codes=[*chain.from_iterable(layer.codes for layer in layers)],
            # Weights of few bits are unpacked for a product of many rows.
            most_rows=MOST_ROWS if any(layer.is_packed for layer in layers) else math.inf,
        )

    def angles(self, offset: Any) -> tuple[Angles, Angles] | None:
        """Return the angles of the position, or None if they are not those of a whole head."""
        return self.rope.angles_of_step(offset) if self.rope.dims == self.width else None

    def takes(self, x: _Position, mask: Any, seen: int, angles: tuple[Angles, Angles]) -> bool:
        """Return whether the function computes this block for these rows: it trusts the shapes."""
        rows = len(x)
        if x.shape != (rows, 1, self.hidden) or rows > self.most_rows or len(angles[0]) != rows:
            return False
        if mask is None:
            return True
        if not isinstance(mask, mx.array) or mask.dtype != mx.bool_ or mask.ndim != 4:
            return False
        return len(mask) in (1, rows) and mask.shape[1:] == (1, 1, seen)

    def prepare(self, cache: StepCache, rows: int) -> bool:
        """Make room for a position in a cache; return whether the function can read its arrays."""
        shapes = [(rows, self.key_heads, 1, width) for width in (self.width, self.value_width)]
        cache.make_room(*shapes)
        places = cache.keys.shape[2]
        for one, shape in zip((cache.keys, cache.values), shapes, strict=True):
            if one.dtype != mx.float32 or one.shape != (*shape[:2], places, shape[3]):
                return False
        return cache.used < places

    def compute(
        self, x: _Position, mask: Any, cache: StepCache, angles: tuple[Angles, Angles]
    ) -> _Position:
        """Return what the block returns, and let its cache take the position."""
        masks = [] if mask is None else [mask]
        stored = cache.keys, cache.values
        arrays = [x, *stored, *self.before, *angles, *self.after, *masks]
        y, keys, values = compiled_operation("block", len(arrays), 3, as_stored=True, changed=2)(
            arrays,
            [x.shape, *(one.shape for one in stored)],
            [
                *(len(x), self.hidden, self.heads, self.key_heads, self.width, self.value_width),
                *(self.inner, cache.keys.shape[2], cache.used, *self.float_bits),
                *(self.has_head_norms, len(masks), *self.layer_codes),
            ],
        )
        cache.take_step(keys, values, next_positions(cache.offset))
        return y


def _fit(block: Any, layers: list[CompiledLinear], norms: list[FastRMSNorm]) -> bool:
    """Return whether the widths of a block's layers are those that the function in C expects."""
    q, k, v, attended, gate, up, down = layers
    heads, key_heads = block["self_attn"].n_heads, block["self_attn"].n_kv_heads
    hidden, width, value_width = q.inputs, q.outputs // heads, v.outputs // key_heads
    widths = [one["weight"].size for one in norms]
    return (
        (q.outputs, k.outputs, v.outputs)
        == (heads * width, key_heads * width, key_heads * value_width)
        and (k.inputs, v.inputs, gate.inputs, up.inputs) == (hidden,) * 4
        and (attended.inputs, attended.outputs) == (heads * value_width, hidden)
        and (up.outputs, down.inputs, down.outputs) == (gate.outputs, gate.outputs, hidden)
        and not heads % key_heads
        and widths == [hidden, hidden, *[width] * (len(norms) - 2)]
    )

"""Blocks of Llama and Qwen that compute a decode step by two operations, on a Linux CPU.

In a decode step, mlx takes longer to begin the seventy operations of a block with LoRA than to
compute them. The functions of `decoder_block.c` compute a block with all its layers: one function
up to the new keys and values, and one from the whole cache on. Other calls, and blocks with other
layers, are computed by the block's own code.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Float
from mlx_lm.models import llama, qwen2, qwen3

from textpolicy.fast_cpu.attention import can_be_compiled, scaled_dot_product_attention
from textpolicy.fast_cpu.gradients import are_gradients_needed
from textpolicy.fast_cpu.mlx_operations import bits_of, compiled_operation, reason_of_none
from textpolicy.fast_cpu.packed_weights import MOST_ROWS
from textpolicy.fast_cpu.rms_norm import FastRMSNorm
from textpolicy.fast_cpu.rotary import FastRoPE

_States = Float[mx.array, "rows time width"]
_Position = Float[mx.array, "rows 1 width"]

_PARTS: dict[type[nn.Module], tuple[type[nn.Module], type[nn.Module]]] = {
    models.TransformerBlock: (models.Attention, models.MLP) for models in (llama, qwen2, qwen3)
}
"""By their classes, the known blocks, each with the classes of its attention and its layers."""
_OF_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_OF_MLP = ("gate_proj", "up_proj", "down_proj")


class _Weights(NamedTuple):
    """The arrays of a layer's weights, those of them that are floats, and the number in C."""

    inputs: int
    outputs: int
    arrays: list[mx.array]
    floats: list[mx.array]
    number: int

    @classmethod
    def of(cls, layer: Any) -> "_Weights | None":
        """Return the weights of a linear layer, or None if its class computes something else."""
        if type(layer) is nn.Linear:
            outputs, inputs = layer["weight"].shape
            arrays = [layer["weight"]]
            return cls(inputs, outputs, arrays, arrays, 0)
        if "packed_matrix" not in vars(type(layer)) or (matrix := layer.packed_matrix()) is None:
            return None
        arrays, number = matrix.arrays, 4 * matrix.groups + matrix.format
        return cls(matrix.inputs, len(arrays[0]), arrays, arrays[1:], number)


class CompiledLinear(NamedTuple):
    """The arrays of a linear layer, perhaps with LoRA or DoRA, and its two numbers.

    `take_linear` in C reads them.
    """

    inputs: int
    outputs: int
    arrays: list[mx.array]
    numbers: tuple[int, int]

    @classmethod
    def of(cls, layer: Any) -> "CompiledLinear | None":
        """Return the arrays of a layer, or None if it computes something else.

        The functions in C trust the shapes, so arrays that do not fit together are refused here.
        """
        # A decode step asks for each layer, and `layer["weight"]` takes a fifth of `layer.weight`.
        factors: list[mx.array] = []
        if "compiled_parts" in vars(type(layer)):
            if (known := layer.compiled_parts()) is None:
                return None
            layer, factors = known
        if (weights := _Weights.of(layer)) is None:
            return None
        inputs, outputs = weights.inputs, weights.outputs
        bias = [layer["bias"]] if "bias" in layer else []
        for one in (*weights.floats, *bias, *factors):
            if one.dtype != mx.float32:
                return None
        # A, B and the scale of LoRA, and the ratio of DoRA.
        rank = factors[0].shape[1] if factors else 0
        if factors and (factors[0].shape[0], factors[1].shape) != (inputs, (rank, outputs)):
            return None
        for one in (*bias, *factors[3:]):
            if one.shape != (outputs,):
                return None
        numbers = 4 * rank + 2 * (len(factors) > 3) + len(bias), weights.number
        return cls(inputs, outputs, [*weights.arrays, *bias, *factors], numbers)

    @property
    def is_packed(self) -> bool:
        """Whether the weights are stored in few bits."""
        return self.numbers[1] > 0


def faster_block(
    block: type[nn.Module], faster_class: Callable[[type[nn.Module]], type[nn.Module]]
) -> type[nn.Module] | None:
    """Return a subclass of a known block that computes decode steps by compiled operations."""
    if block not in _PARTS:
        return None
    attention, layers = map(faster_class, _PARTS[block])
    plain: Any = block.__call__

    def call(self: Any, x: _States, mask: Any = None, cache: Any = None) -> _States:
        is_step = x.shape[1] == 1 and cache is not None and not are_gradients_needed()
        readable = is_step and x.size and x.dtype == mx.float32 and not hasattr(cache, "bits")
        if readable and (step := compiled_step(self)) and step.takes(x):
            return step.compute(x, mask, cache)
        return plain(self, x, mask, cache)

    def compiled_step(self: Any) -> _Step | None:
        if mx.default_device().type != mx.cpu or reason_of_none():
            return None
        if type(self.self_attn) is not attention or type(self.mlp) is not layers:
            return None
        return _Step.of(self)

    names = {"__module__": block.__module__, "__qualname__": block.__qualname__}
    methods = {"__call__": call, "compiled_step": compiled_step}
    return type(block.__name__, (block,), names | methods)


def has_compiled_steps(model: nn.Module) -> bool:
    """Return whether all blocks of a model, if it has any, compute decode steps in this way."""
    blocks: list[Any] = [one for one in model.modules() if hasattr(type(one), "compiled_step")]
    return bool(blocks) and all(block.compiled_step() for block in blocks)


@dataclass(frozen=True)
class _Step:
    """What the compiled functions need of a block."""

    block: Any
    layers: list[CompiledLinear]
    head_norms: list[FastRMSNorm]
    most_rows: float

    @classmethod
    def of(cls, block: Any) -> "_Step | None":
        """Return the parts of a block, or None if compiled functions cannot compute it."""
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
        if not _fit(block, layers, norms):
            return None
        # Weights of few bits are unpacked for a product of many rows.
        most_rows = MOST_ROWS if any(layer.is_packed for layer in layers) else math.inf
        return cls(block, layers, head_norms, most_rows)

    def takes(self, x: _Position) -> bool:
        """Return whether the functions compute this block for these rows."""
        return x.shape[-1] == self.layers[0].inputs and len(x) <= self.most_rows

    def compute(self, x: _Position, mask: Any, cache: Any) -> _Position:
        """Return what the block returns, and let its cache take the position."""
        attention, mlp = self.block.self_attn, self.block.mlp
        queries, keys, values = self._inputs(x, cache.offset)
        keys, values = cache.update_and_fetch(keys, values)
        if can_be_compiled(queries, keys, values, mask):
            return self._outputs(x, queries, keys, values, mask)
        attended = scaled_dot_product_attention(
            queries, keys, values, cache=cache, scale=attention.scale, mask=mask
        )
        h = x + attention.o_proj(attended.transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1))
        return h + mlp(self.block.post_attention_layernorm(h))

    def _inputs(self, x: _Position, offset: Any) -> tuple[mx.array, mx.array, mx.array]:
        """Return the queries, keys and values of the new position."""
        attention, norm = self.block.self_attn, self.block.input_layernorm
        rope, heads, key_heads = attention.rope, attention.n_heads, attention.n_kv_heads
        q, k, v = self.layers[:3]
        width, value_width = q.outputs // heads, v.outputs // key_heads
        known = type(rope) is FastRoPE and rope.dims == width and rope.angles_of_step(offset)
        angles = known if known and len(known[0]) == len(x) else ()
        arrays = [
            *(x, norm.weight, *q.arrays, *k.arrays, *v.arrays),
            *(one.weight for one in self.head_norms),
            *angles,
        ]
        head_epsilon = self.head_norms[0].eps if self.head_norms else 0.0
        rows, _, hidden = x.shape
        queries, keys, values = compiled_operation("block_inputs", len(arrays), 3, as_stored=True)(
            arrays,
            [
                (rows, heads, 1, width),
                (rows, key_heads, 1, width),
                (rows, key_heads, 1, value_width),
            ],
            (
                *(rows, hidden, heads, key_heads, width, value_width),
                *(bits_of(norm.eps), bits_of(head_epsilon)),
                *(len(self.head_norms) // 2, len(angles) // 2),
                *chain.from_iterable(layer.numbers for layer in (q, k, v)),
            ),
        )
        if not angles:
            queries, keys = rope(queries, offset=offset), rope(keys, offset=offset)
        return queries, keys, values

    def _outputs(
        self, x: _Position, queries: mx.array, keys: mx.array, values: mx.array, mask: Any
    ) -> _Position:
        """Return the block's result from the queries and the whole cache."""
        norm, layers = self.block.post_attention_layernorm, self.layers[3:]
        masks = [mask] if isinstance(mask, mx.array) else []
        arrays = [x, queries, keys, values, norm.weight]
        for layer in layers:
            arrays += layer.arrays
        rows, _, hidden = x.shape
        _, heads, _, width = queries.shape
        _, key_heads, seen, value_width = values.shape
        inner = layers[1].outputs
        return compiled_operation("block_outputs", len(arrays) + len(masks), 1, as_stored=True)(
            [*arrays, *masks],
            [x.shape],
            (
                *(rows, hidden, key_heads, heads // key_heads, seen, width, value_width, inner),
                *(bits_of(self.block.self_attn.scale), bits_of(norm.eps), len(masks)),
                *chain.from_iterable(layer.numbers for layer in layers),
            ),
        )[0]


def _fit(block: Any, layers: list[CompiledLinear], norms: list[FastRMSNorm]) -> bool:
    """Return whether the widths of a block's layers are those that the functions in C expect."""
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
        and widths == [hidden, hidden, *[width] * (len(norms) - 2)]
    )

"""DoRA (https://arxiv.org/abs/2402.09353): LoRA's direction, and a trained length m for each row.

    W' = m * (W + s B A) / ||W + s B A||        row by row; W is outputs x inputs

The norm never needs the sum as a matrix. Over the rows it is

    ||W + s B A||^2 = ||W||^2 + 2 s <W A^T, B> + s^2 <B (A A^T), B>

of which the first term is frozen and measured once, and the others are products with the small
factors. As in the paper (section 4.3) and in PEFT, no gradient flows through the norm. A fresh
layer has m equal to the norm, so it computes what the base does, bit for bit. A row of W that is
zero has no direction: it keeps LoRA's update until its norm is no longer zero.
"""

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Float, Integer

from textpolicy.adapters.config.rules import LoRARule
from textpolicy.adapters.layers.adapter_layer import AdapterLayer, refuse_output_bias
from textpolicy.adapters.quantization.stored_weights import float_weight, row_squares, times_weight
from textpolicy.errors import AdapterError


class DoRALinear(AdapterLayer):
    """A: inputs x rank, B: rank x outputs, m: outputs; beside a linear layer of any format."""

    kind = "dora"

    def __init__(self, base: nn.Module, rule: LoRARule, key: mx.array) -> None:
        super().__init__(base, rule, key, "linear")
        self._row_squares = row_squares(base)
        self._measured = type(base)
        self.m = mx.sqrt(self._row_squares)

    def __call__(self, x: Float[mx.array, "*batch in"]) -> Float[mx.array, "*batch out"]:
        y = self.base(x)
        weighed = y.astype(mx.float32)
        # The base's bias is no part of the weight, and keeps its length.
        without_bias = weighed - self.base.bias if "bias" in self.base else weighed
        ratio = self.ratio()
        update = (self.gain() * (self.dropout(x) @ self.lora_a)) @ self.lora_b
        update = (ratio - 1) * without_bias + ratio * update
        if "lora_bias" in self:
            update = update + self.offset()
        return (weighed + update).astype(y.dtype)

    def ratio(self) -> Float[mx.array, " out"]:
        """By how much each output is longer than its direction; 1 while the gate is shut."""
        _check_measured(self.base, self._measured)
        a, b = mx.stop_gradient(self.lora_a), mx.stop_gradient(self.lora_b)
        crossed = 2 * self._scale * (times_weight(self.base, a) * b.T).sum(axis=-1)
        own = mx.square(self._scale) * ((b.T @ (a.T @ a)) * b.T).sum(axis=-1)
        return _ratio(self.m, self._row_squares + crossed + own, self._enabled)

    def delta(self) -> Float[mx.array, "out in"]:
        base = float_weight(self.base)
        return _renormed(base, self._scale * (self.lora_a @ self.lora_b).T, self.m) - base


class DoRAEmbedding(AdapterLayer):
    """A: vocabulary x rank, B: rank x features, m: vocabulary; beside an embedding table.

    Each token's vector has its length, as in mlx-lm. PEFT gives lengths to features instead, so
    such adapters cannot be exchanged with it. A tied output head is adapted with the table.
    """

    kind = "dora"

    def __init__(self, base: nn.Module, rule: LoRARule, key: mx.array) -> None:
        refuse_output_bias(rule, "an embedding")
        super().__init__(base, rule, key, "embedding")
        self._row_squares = row_squares(base)
        self._measured = type(base)
        self.m = mx.sqrt(self._row_squares)

    def __call__(self, ids: Integer[mx.array, "*batch"]) -> Float[mx.array, "*batch features"]:
        y = self.base(ids)
        weighed = y.astype(mx.float32)
        a = self.lora_a[ids]
        fixed = self._scale * (mx.stop_gradient(a) @ mx.stop_gradient(self.lora_b))
        squares = self._row_squares[ids] + (2 * weighed * fixed + mx.square(fixed)).sum(axis=-1)
        ratio = _ratio(self.m[ids], squares, self._enabled)[..., None]
        update = (self.gain() * self.dropout(a)) @ self.lora_b
        return (weighed + (ratio - 1) * weighed + ratio * update).astype(y.dtype)

    def as_linear(
        self, x: Float[mx.array, "*batch features"]
    ) -> Float[mx.array, "*batch vocabulary"]:
        """The table as an output head."""
        y = self.base.as_linear(x)
        weighed = y.astype(mx.float32)
        ratio = self.ratio()
        update = (self.gain() * (self.dropout(x) @ self.lora_b.T)) @ self.lora_a.T
        return (weighed + (ratio - 1) * weighed + ratio * update).astype(y.dtype)

    def ratio(self) -> Float[mx.array, " vocabulary"]:
        """By how much each vector is longer than its direction; 1 while the gate is shut."""
        _check_measured(self.base, self._measured)
        a, b = mx.stop_gradient(self.lora_a), mx.stop_gradient(self.lora_b)
        crossed = 2 * self._scale * (times_weight(self.base, b.T) * a).sum(axis=-1)
        own = mx.square(self._scale) * ((a @ (b @ b.T)) * a).sum(axis=-1)
        return _ratio(self.m, self._row_squares + crossed + own, self._enabled)

    def delta(self) -> Float[mx.array, "vocabulary features"]:
        base = float_weight(self.base)
        return _renormed(base, self._scale * (self.lora_a @ self.lora_b), self.m) - base


def _ratio(
    m: Float[mx.array, "*rows"], squares: Float[mx.array, "*rows"], enabled: mx.array
) -> Float[mx.array, "*rows"]:
    """m over the norm whose square is given. Rounding may take the square of a zero below zero."""
    live = (squares > 0) & enabled
    return mx.where(live, m / mx.sqrt(mx.where(live, squares, 1)), 1)


def _renormed(
    base: Float[mx.array, "out in"], product: Float[mx.array, "out in"], m: mx.array
) -> Float[mx.array, "out in"]:
    adapted = base + product
    norm = mx.linalg.norm(adapted, axis=-1)
    return mx.where(norm > 0, m / mx.where(norm > 0, norm, 1), 1)[:, None] * adapted


def _check_measured(base: nn.Module, measured: type[nn.Module]) -> None:
    if type(base) is not measured:
        raise AdapterError(
            f"DoRA was put around a {measured.__name__}, which is a {type(base).__name__} now: the "
            "lengths of its rows are no longer those that were measured. Quantize first, then adapt"
        )

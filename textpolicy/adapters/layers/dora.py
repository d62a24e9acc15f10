"""DoRA (https://arxiv.org/abs/2402.09353): LoRA's direction, and a trained magnitude for each row.

    W' = m * (W + s B A) / ||W + s B A||        row by row; W is outputs x inputs

The norm is computed without forming the sum as a matrix. For each row,

    ||W + s B A||^2 = ||W||^2 + 2 s <W A^T, B> + s^2 <B (A A^T), B>

The first term is frozen and measured once. The other terms are products with the small factors.
As in the paper (section 4.3) and in PEFT, no gradient flows through the norm. In a new layer m
equals the norm, so the layer computes bit for bit what its base does. A row of W that is all zeros
has no direction, so the row gets LoRA's update until its norm is above zero.
"""

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Float, Integer

from textpolicy.adapters.config.rules import LoRARule
from textpolicy.adapters.layers.adapter_layer import AdapterLayer
from textpolicy.adapters.quantization.stored_weights import float_weight, row_squares, times_weight
from textpolicy.errors import AdapterError
from textpolicy.fast_cpu.weight_values import weight_value


class DoRALayer(AdapterLayer):
    """Abstract: the magnitudes, and the norm of each row of the adapted weight."""

    kind = "dora"

    def __init__(self, base: nn.Module, rule: LoRARule, key: mx.array) -> None:
        super().__init__(base, rule, key)
        self._row_squares = row_squares(base)
        self._measured_type = type(base)
        self.m = mx.sqrt(self._row_squares)

    def ratio(self) -> Float[mx.array, " rows"]:
        """Return each row's magnitude divided by its norm, or 1 while the gate is False.

        Decode steps compute it once for all steps with the same adapter.
        """
        _refuse_changed_base(self.base, self._measured_type)
        return weight_value(self, self._ratio)

    def _ratio(self) -> Float[mx.array, " rows"]:
        left, right = map(mx.stop_gradient, self.factors())
        crossed = 2 * self._scale * (times_weight(self.base, right.T) * left).sum(axis=-1)
        own = mx.square(self._scale) * ((left @ (right @ right.T)) * left).sum(axis=-1)
        return _divide_by_norm(self.m, self._row_squares + crossed + own, self._enabled)

    def delta(self) -> Float[mx.array, "rows columns"]:
        base = float_weight(self.base)
        adapted = base + super().delta()
        squares = mx.square(adapted).sum(axis=-1)
        return _divide_by_norm(self.m, squares, mx.array(True))[:, None] * adapted - base


class DoRALinear(DoRALayer):
    """DoRA around a linear layer of any format. A: inputs x rank, B: rank x outputs, m: outputs."""

    module_kind = "linear"

    def __call__(self, x: Float[mx.array, "*batch in"]) -> Float[mx.array, "*batch out"]:
        y = self.base(x)
        base_output = y.astype(mx.float32)
        # The base's bias is not part of the weight, so DoRA does not rescale the bias.
        without_bias = base_output - self.base.bias if "bias" in self.base else base_output
        ratio = self.ratio()
        update = (self.gated_scale() * (self.dropout(x) @ self.lora_a)) @ self.lora_b
        update = (ratio - 1) * without_bias + ratio * update
        if "lora_bias" in self:
            update = update + self.gated_bias()
        return (base_output + update).astype(y.dtype)

    def compiled_parts(self) -> tuple[nn.Module, list[mx.array]] | None:
        """Return the base, with A, B, the scale and the ratio, which multiplies their sum.

        Return None if there is more in the output, beside the base's bias.
        """
        if self.drops_inputs or "lora_bias" in self:
            return None
        return self["base"], [self["lora_a"], self["lora_b"], self.gated_scale(), self.ratio()]


class DoRAEmbedding(DoRALayer):
    """DoRA around an embedding table. A: vocabulary x rank, B: rank x features, m: vocabulary.

    Each token's vector has a magnitude, as in mlx-lm. PEFT trains a magnitude for each feature
    instead, so DoRA on embeddings cannot be exchanged with PEFT. If a model uses the table as its
    output head too, the adapter changes both the lookup and the head.
    """

    module_kind = "embedding"

    def __call__(self, ids: Integer[mx.array, "*batch"]) -> Float[mx.array, "*batch features"]:
        y = self.base(ids)
        base_output = y.astype(mx.float32)
        a = self.lora_a[ids]
        fixed = self._scale * (mx.stop_gradient(a) @ mx.stop_gradient(self.lora_b))
        crossed = (2 * base_output * fixed + mx.square(fixed)).sum(axis=-1)
        squares = self._row_squares[ids] + crossed
        ratio = _divide_by_norm(self.m[ids], squares, self._enabled)[..., None]
        update = (self.gated_scale() * self.dropout(a)) @ self.lora_b
        return (base_output + (ratio - 1) * base_output + ratio * update).astype(y.dtype)

    def as_linear(
        self, x: Float[mx.array, "*batch features"]
    ) -> Float[mx.array, "*batch vocabulary"]:
        """Return the logits that the table gives as an output head."""
        y = self.base.as_linear(x)
        base_output = y.astype(mx.float32)
        ratio = self.ratio()
        update = (self.gated_scale() * (self.dropout(x) @ self.lora_b.T)) @ self.lora_a.T
        return (base_output + (ratio - 1) * base_output + ratio * update).astype(y.dtype)


def _divide_by_norm(
    m: Float[mx.array, "*rows"], squares: Float[mx.array, "*rows"], enabled: mx.array
) -> Float[mx.array, "*rows"]:
    """Return m divided by the root of `squares`, or 1 where there is no norm to divide by."""
    # Rounding can make the square of a zero norm slightly negative.
    usable = (squares > 0) & enabled
    return mx.where(usable, m / mx.sqrt(mx.where(usable, squares, 1)), 1)


def _refuse_changed_base(base: nn.Module, measured_type: type[nn.Module]) -> None:
    if type(base) is not measured_type:
        raise AdapterError(
            f"DoRA measured the rows of a {measured_type.__name__}, but the base is a "
            f"{type(base).__name__} now, so the measured norms are wrong. Quantize the model "
            "first, then adapt it"
        )

"""LoRA (https://arxiv.org/abs/2106.09685): the base's output plus scale * x A B.

Fresh layers have B = 0, so they compute what the base does, bit for bit.
"""

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Float, Integer

from textpolicy.adapters.config.rules import LoRARule
from textpolicy.adapters.layers.adapter_layer import AdapterLayer, refuse_output_bias


class LoRALinear(AdapterLayer):
    """A: inputs x rank, B: rank x outputs; beside a linear layer of any number format."""

    kind = "lora"

    def __init__(self, base: nn.Module, rule: LoRARule, key: mx.array) -> None:
        super().__init__(base, rule, key, "linear")

    def __call__(self, x: Float[mx.array, "*batch in"]) -> Float[mx.array, "*batch out"]:
        y = self.base(x)
        # Gate and scale meet the activations where they are narrowest: this is their whole cost.
        update = (self.gain() * (self.dropout(x) @ self.lora_a)) @ self.lora_b
        if "lora_bias" in self:
            update = update + self.offset()
        return y + update.astype(y.dtype)

    def delta(self) -> Float[mx.array, "out in"]:
        return self._scale * (_float(self.lora_a) @ _float(self.lora_b)).T


class LoRAEmbedding(AdapterLayer):
    """A: vocabulary x rank, B: rank x features; beside an embedding table.

    Where a model ties its output head to this table (`as_linear`), the head is adapted with it:
    both read W + scale * A B. PEFT adapts the lookup alone unless told `ensure_weight_tying`.
    """

    kind = "lora"

    def __init__(self, base: nn.Module, rule: LoRARule, key: mx.array) -> None:
        refuse_output_bias(rule, "an embedding")
        super().__init__(base, rule, key, "embedding")

    def __call__(self, ids: Integer[mx.array, "*batch"]) -> Float[mx.array, "*batch features"]:
        y = self.base(ids)
        update = (self.gain() * self.dropout(self.lora_a[ids])) @ self.lora_b
        return y + update.astype(y.dtype)

    def as_linear(
        self, x: Float[mx.array, "*batch features"]
    ) -> Float[mx.array, "*batch vocabulary"]:
        """The table as an output head."""
        y = self.base.as_linear(x)
        update = (self.gain() * (self.dropout(x) @ self.lora_b.T)) @ self.lora_a.T
        return y + update.astype(y.dtype)

    def delta(self) -> Float[mx.array, "vocabulary features"]:
        return self._scale * (_float(self.lora_a) @ _float(self.lora_b))


class LoRASwitchLinear(AdapterLayer):
    """A: experts x rank x inputs, B: experts x outputs x rank; beside mlx-lm's expert layers.

    The axes are those of mlx-lm's files, and not the ones of `LoRALinear`.
    """

    kind = "lora"
    rank_axis = 1

    def __init__(self, base: nn.Module, rule: LoRARule, key: mx.array) -> None:
        refuse_output_bias(rule, "experts")
        super().__init__(base, rule, key, "experts")

    def __call__(
        self,
        x: Float[mx.array, "*batch 1 in"],
        indices: Integer[mx.array, "*chosen"],
        sorted_indices: bool = False,
    ) -> Float[mx.array, "*chosen 1 out"]:
        y = self.base(x, indices, sorted_indices=sorted_indices)
        update = self.dropout(x).astype(mx.float32)
        for factor in (self.lora_a, self.gain() * self.lora_b):
            update = mx.gather_mm(
                update,
                factor.swapaxes(-1, -2),
                rhs_indices=indices,
                sorted_indices=sorted_indices,
            )
        return y + update.astype(y.dtype)

    def delta(self) -> Float[mx.array, "experts out in"]:
        return self._scale * (_float(self.lora_b) @ _float(self.lora_a))


def _float(factor: mx.array) -> mx.array:
    return factor.astype(mx.float32)

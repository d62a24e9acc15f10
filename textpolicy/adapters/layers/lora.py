"""LoRA (https://arxiv.org/abs/2106.09685): the base's output plus scale * x A B.

A new layer has B = 0, so it computes bit for bit what its base does.
"""

import math

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Float, Integer

from textpolicy.adapters.layers.adapter_layer import AdapterLayer
from textpolicy.fast_cpu.lora import lora_linear

_BYTES_READ_TOGETHER = 16


class LoRALinear(AdapterLayer):
    """LoRA around a linear layer of any number format. A: inputs x rank, B: rank x outputs."""

    kind = "lora"
    module_kind = "linear"

    def __call__(self, x: Float[mx.array, "*batch in"]) -> Float[mx.array, "*batch out"]:
        # All three products take the same two axes.
        batch = x.shape[:-1]
        x = x.reshape(math.prod(batch), x.shape[-1])
        if (y := self._compiled(x)) is not None:
            return y.reshape(*batch, y.shape[-1])
        y = self.base(x)
        # Gate and scale multiply the activations of size rank, where this costs least.
        update = (self.gated_scale() * (self.dropout(x) @ self.lora_a)) @ self.lora_b
        if "lora_bias" in self:
            update = update + self.gated_bias()
        return (y + update.astype(y.dtype)).reshape(*batch, y.shape[-1])

    def _compiled(self, x: Float[mx.array, "rows in"]) -> Float[mx.array, "rows out"] | None:
        """Return the output as one operation, or None where this layer or device has none."""
        if type(self.base) is not nn.Linear or (parts := self.compiled_parts()) is None:
            return None
        base, factors = parts
        return lora_linear(x, base["weight"], base.get("bias"), *factors)

    def compiled_parts(self) -> tuple[nn.Module, list[mx.array]] | None:
        """Return the base, with A, B and the scale; None if the output is more than their sum."""
        if self.drops_inputs or "lora_bias" in self:
            return None
        return self["base"], [self["lora_a"], self["lora_b"], self.gated_scale()]


class LoRAEmbedding(AdapterLayer):
    """LoRA around an embedding table. A: vocabulary x rank, B: rank x features.

    If a model uses this table as its output head too (`as_linear`), the adapter changes both the
    lookup and the head. PEFT adapts only the lookup unless `ensure_weight_tying` is set.
    """

    kind = "lora"
    module_kind = "embedding"

    def __call__(self, ids: Integer[mx.array, "*batch"]) -> Float[mx.array, "*batch features"]:
        y = self.base(ids)
        update = (self.gated_scale() * self.dropout(self.lora_a[ids])) @ self.lora_b
        return y + update.astype(y.dtype)

    def as_linear(
        self, x: Float[mx.array, "*batch features"]
    ) -> Float[mx.array, "*batch vocabulary"]:
        """Return the logits that the table gives as an output head."""
        y = self.base.as_linear(x)
        update = (self.gated_scale() * (self.dropout(x) @ self.lora_b.T)) @ self.lora_a.T
        return y + update.astype(y.dtype)


class LoRASwitchLinear(AdapterLayer):
    """LoRA around mlx-lm's expert layers. A: experts x rank x inputs, B: experts x outputs x rank.

    The order of the axes is that of mlx-lm's files. It differs from the order in `LoRALinear`.
    """

    kind = "lora"
    module_kind = "experts"

    def __call__(
        self,
        x: Float[mx.array, "*batch 1 in"],
        indices: Integer[mx.array, "*chosen"],
        sorted_indices: bool = False,
    ) -> Float[mx.array, "*chosen 1 out"]:
        y = self.base(x, indices, sorted_indices=sorted_indices)
        update = self.dropout(x).astype(mx.float32)
        for factor in self._aligned(self.lora_a, self.gated_scale() * self.lora_b):
            update = mx.gather_mm(
                update, factor.swapaxes(-1, -2), rhs_indices=indices, sorted_indices=sorted_indices
            )
        return y + update.astype(y.dtype)

    def _aligned(
        self, a: Float[mx.array, "experts rank in"], b: Float[mx.array, "experts out rank"]
    ) -> tuple[Float[mx.array, "experts all in"], Float[mx.array, "experts out all"]]:
        """Return the factors, on CUDA with zeros behind the rank where mlx needs them.

        There `mx.gather_mm` reads 16 bytes at a time, and fails if a row of the rank has another
        number of bytes. The zeros change no number of the product.
        """
        missing = -self.rank % (_BYTES_READ_TOGETHER // a.itemsize)
        if not missing or not mx.cuda.is_available():
            return a, b
        return mx.pad(a, [(0, 0), (0, missing), (0, 0)]), mx.pad(b, [(0, 0), (0, 0), (0, missing)])

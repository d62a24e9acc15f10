"""What every adapter layer has: a frozen module, two small factors, a scale and a gate."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Bool, Float

from textpolicy.adapters.config.rules import LoRARule, draw_initial_array
from textpolicy.adapters.module_tree import named_arrays
from textpolicy.adapters.quantization.stored_weights import ModuleKind, float_weight, weight_shape
from textpolicy.errors import AdapterError

_TRAINABLE = ("lora_a", "lora_b", "m", "lora_bias")


class AdapterLayer(nn.Module):
    """Abstract. `base` is the module as it was; the tensors beside it are float32 over any dtype.

    `scale` and the gate are arrays with an underscore in their names: a compiled function that
    takes the model's state sees them change, and no optimizer does.
    """

    kind: ClassVar[str]
    rank_axis: ClassVar[int] = -1
    """The axis of `lora_a` that is the rank."""
    # mlx's modules have neither a type for being called nor for what they hold.
    base: Any
    lora_a: mx.array
    lora_b: mx.array
    lora_bias: mx.array
    m: mx.array
    owner: object = None
    """The container that put the layer into a model; `AdapterContainer.of` finds it here."""

    def __init__(
        self,
        base: nn.Module,
        rule: LoRARule,
        key: mx.array,
        site: ModuleKind,
    ) -> None:
        super().__init__()
        key_a, key_b = mx.random.split(key)
        weight = weight_shape(base)
        # A's inputs are what it is multiplied by: features, or the tokens of a vocabulary.
        inputs = weight[0] if site == "embedding" else weight[-1]
        shapes = tensor_shapes(rule, site, weight)
        draw = partial(draw_initial_array, inputs=inputs, rank=rule.rank)
        self.base = base
        self.dropout = nn.Dropout(rule.dropout)
        self.lora_a = draw(rule.a_init, shapes["lora_a"], key=key_a)
        self.lora_b = draw(rule.b_init, shapes["lora_b"], key=key_b)
        if rule.bias:
            self.lora_bias = mx.zeros(shapes["lora_bias"])
        self._scale = mx.array(rule.scale, mx.float32)
        self._enabled = mx.array(True)

    @property
    def trainable(self) -> tuple[str, ...]:
        """The names of the tensors that training moves."""
        return tuple(name for name in _TRAINABLE if name in self)

    @property
    def rank(self) -> int:
        """The inner size of the product, as it is now."""
        return self.lora_a.shape[self.rank_axis]

    @property
    def scale(self) -> float:
        """What multiplies the low-rank product."""
        return float(self._scale)

    def set_scale(self, scale: float) -> None:
        """Change the scale, under the eyes of compiled functions."""
        self._scale = mx.array(scale, mx.float32)

    def retune(self, rule: LoRARule) -> None:
        """Take scale and dropout from a rule; rank and kind are in the tensors."""
        self.set_scale(rule.scale)
        self.dropout = nn.Dropout(rule.dropout).train(self.training)

    def switch(self, on: Bool[mx.array, ""]) -> Bool[mx.array, ""]:
        """Set the gate; returns what it was. Off is the base exactly."""
        before = self._enabled
        self._enabled = on
        return before

    @abstractmethod
    def delta(self) -> Float[mx.array, "*weight"]:
        """What the adapters add to the base's weight, in its shape and in float32."""

    def merged_weight(self) -> Float[mx.array, "*weight"]:
        """The float32 weight with which the base alone would compute what the layer does."""
        return float_weight(self.base) + self.delta()

    def product_square(self) -> Float[mx.array, ""]:
        """The squared Frobenius norm of scale times the low-rank product, which is never made."""
        a, b = self.lora_a.astype(mx.float32), self.lora_b.astype(mx.float32)
        if self.rank_axis == 1:
            a, b = a.swapaxes(-1, -2), b.swapaxes(-1, -2)
        # ||AB||^2 is the sum of (A'A) * (BB').
        return mx.square(self._scale) * (a.swapaxes(-1, -2) @ a * (b @ b.swapaxes(-1, -2))).sum()

    def merged_bias(self) -> Float[mx.array, "*bias"] | None:
        """The bias that goes with `merged_weight`; the base's own if adapters leave it alone."""
        own: mx.array | None = self.base.get("bias")
        if "lora_bias" not in self:
            return own
        offset = self.lora_bias.astype(mx.float32)
        return offset if own is None else own.astype(mx.float32) + offset

    def gain(self) -> Float[mx.array, ""]:
        """The scale, or zero while the gate is shut."""
        return mx.where(self._enabled, self._scale, 0.0)

    def offset(self) -> Float[mx.array, " out"]:
        """The trained offset of the output, or zero while the gate is shut."""
        return mx.where(self._enabled, self.lora_bias, 0.0)


def tensor_shapes(
    rule: LoRARule, site: ModuleKind, weight: Sequence[int]
) -> dict[str, tuple[int, ...]]:
    """The trained tensors of a layer beside a weight of this shape, by name."""
    *experts, outputs, inputs = weight
    rank = rule.rank
    match site:
        case "linear":
            shapes = {"lora_a": (inputs, rank), "lora_b": (rank, outputs)}
        case "embedding":
            shapes = {"lora_a": (outputs, rank), "lora_b": (rank, inputs)}
        case "experts":
            shapes = {"lora_a": (*experts, rank, inputs), "lora_b": (*experts, outputs, rank)}
    lengths = {"m": (outputs,)} if rule.kind == "dora" else {}
    return shapes | lengths | ({"lora_bias": (outputs,)} if rule.bias else {})


def refuse_output_bias(rule: LoRARule, what: str) -> None:
    """Offsets exist on linear layers only."""
    if rule.bias:
        raise AdapterError(f"bias=True on {what}: only linear layers have a bias to train")


def adapter_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """The adapter layers in a model by path, first block first."""
    modules = reversed(model.named_modules())
    return {path: module for path, module in modules if isinstance(module, AdapterLayer)}


def base_path(path: str, layers: Mapping[str, AdapterLayer]) -> str:
    """The path that a module inside the adapted model has without adapters."""
    outer, _, name = path.rpartition(".")
    return outer if name == "base" and outer in layers else path


def base_parameters(model: nn.Module) -> dict[str, mx.array]:
    """The parameters that are not adapters, under the names that they have without adapters."""
    layers = adapter_layers(model)
    named: dict[str, mx.array] = {}
    for name, array in named_arrays(model.parameters()).items():
        module, _, leaf = name.rpartition(".")
        if module not in layers:
            named[f"{base_path(module, layers)}.{leaf}"] = array
    return named

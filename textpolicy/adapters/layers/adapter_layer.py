"""The base class of all adapter layers: a frozen module, two small factors, a scale and a gate."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Bool, Float

from textpolicy.adapters.config.rules import LoRARule, draw_initial_array
from textpolicy.adapters.module_tree import named_arrays
from textpolicy.adapters.quantization.stored_weights import (
    ModuleKind,
    float_dtype,
    float_weight,
    make_float_module,
    weight_shape,
)
from textpolicy.errors import AdapterError

_TRAINABLE = ("lora_a", "lora_b", "m", "lora_bias")


class AdapterLayer(nn.Module):
    """Abstract. `base` is the original module; the trained tensors are float32 over any base dtype.

    The scale, the gate and their product are arrays whose names begin with an underscore. A
    compiled function that takes the model's state sees them change, and no optimizer updates them.
    """

    kind: ClassVar[str]
    module_kind: ClassVar[ModuleKind]
    # mlx declares no type for calling a module or for the arrays that a module holds.
    base: Any
    lora_a: mx.array
    lora_b: mx.array
    lora_bias: mx.array
    m: mx.array
    owner: object = None
    """The container that put the layer into a model; `AdapterContainer.of` finds it here."""

    def __init__(self, base: nn.Module, rule: LoRARule, key: mx.array) -> None:
        super().__init__()
        if rule.bias and self.module_kind != "linear":
            raise AdapterError(
                f"A rule sets bias=True for a layer of kind {self.module_kind!r}. Only linear "
                "layers can train a bias. Set bias=False, or name only linear layers in the rule"
            )
        weight = weight_shape(base)
        shapes = tensor_shapes(rule, self.module_kind, weight)
        # An embedding selects rows of A by token id, so A's inputs are the vocabulary.
        inputs = weight[0] if self.module_kind == "embedding" else weight[-1]
        draw = partial(draw_initial_array, inputs=inputs, rank=rule.rank)
        key_a, key_b = mx.random.split(key)
        self.base = base
        self.dropout = nn.Dropout(rule.dropout)
        self.lora_a = draw(rule.a_init, shapes["lora_a"], key=key_a)
        self.lora_b = draw(rule.b_init, shapes["lora_b"], key=key_b)
        if rule.bias:
            self.lora_bias = mx.zeros(shapes["lora_bias"])
        self._scale = self._gated_scale = mx.array(rule.scale, mx.float32)
        self._enabled = mx.array(True)

    @property
    def trainable(self) -> tuple[str, ...]:
        """The names of the tensors that training updates."""
        return tuple(name for name in _TRAINABLE if name in self)

    @property
    def rank(self) -> int:
        """The present rank of the low-rank product."""
        return self.factors()[0].shape[-1]

    @property
    def drops_inputs(self) -> bool:
        """Whether dropout replaces some inputs by zeros now."""
        return self.training and self.dropout._p_1 < 1  # pyright: ignore[reportPrivateUsage]

    @property
    def scale(self) -> float:
        """The number that multiplies the low-rank product."""
        return float(self._scale)

    @property
    def enabled(self) -> bool:
        """Whether the gate is open: if not, the layer computes exactly what its base does."""
        return bool(self._enabled)

    def set_scale(self, scale: float) -> None:
        """Change the scale. Compiled functions see the change."""
        self._scale = mx.array(scale, mx.float32)
        self._gate_scale()

    def set_enabled(self, enabled: Bool[mx.array, ""]) -> None:
        """Set the gate. While the gate is False, the layer computes exactly what its base does."""
        self._enabled = enabled
        self._gate_scale()

    def _gate_scale(self) -> None:
        self._gated_scale = mx.where(self._enabled, self._scale, 0.0)

    def state_arrays(self) -> list[mx.array]:
        """Return the arrays that decide what the layer adds to its base."""
        return [
            value
            for name, value in self.items()
            # The gated scale follows from the scale and the gate.
            if isinstance(value, mx.array) and name != "_gated_scale"
        ]

    def factors(self) -> tuple[Float[mx.array, "*e out rank"], Float[mx.array, "*e rank in"]]:
        """Return the two factors such that their product has the shape of the base's weight."""
        match self.module_kind:
            case "linear":
                return self.lora_b.T, self.lora_a.T
            case "embedding":
                return self.lora_a, self.lora_b
            case "experts":
                return self.lora_b, self.lora_a

    def delta(self) -> Float[mx.array, "*weight"]:
        """Return the float32 array that the adapter adds to the base's weight."""
        left, right = self.factors()
        return self._scale * (left.astype(mx.float32) @ right.astype(mx.float32))

    def product_square(self) -> Float[mx.array, ""]:
        """Return the squared Frobenius norm of scale times A B, without computing A B."""
        left, right = (factor.astype(mx.float32) for factor in self.factors())
        # ||LR||^2 is the sum of (L'L) * (RR').
        squares = (left.swapaxes(-1, -2) @ left) * (right @ right.swapaxes(-1, -2))
        return mx.square(self._scale) * squares.sum()

    def merged_weight(self) -> Float[mx.array, "*weight"]:
        """Return the float32 weight with which the base alone computes what this layer does."""
        return float_weight(self.base) + self.delta()

    def merged_bias(self) -> Float[mx.array, "*bias"] | None:
        """Return the bias that belongs to `merged_weight`: the base's plus the trained bias."""
        own: mx.array | None = self.base.get("bias")
        if "lora_bias" not in self:
            return own
        trained = self.lora_bias.astype(mx.float32)
        return trained if own is None else own.astype(mx.float32) + trained

    def fused(self, dtype: mx.Dtype | None = None) -> nn.Module:
        """Return a plain float module that computes what this layer does, up to rounding.

        The default dtype is the base's. The layer and the model stay unchanged;
        `AdapterContainer.fuse` replaces every layer of a model and reports what rounding loses.
        """
        weight = self.merged_weight().astype(dtype or float_dtype(self.base))
        return make_float_module(self.base, weight, self.merged_bias())

    def reverted(self) -> nn.Module:
        """Return the original module, which computes what the model did without adapters."""
        return self.base

    def gated_scale(self) -> Float[mx.array, ""]:
        """Return the scale, or zero while the gate is False."""
        return self["_gated_scale"]

    def gated_bias(self) -> Float[mx.array, " out"]:
        """Return the trained bias, or zeros while the gate is False."""
        return mx.where(self._enabled, self.lora_bias, 0.0)


def tensor_shapes(
    rule: LoRARule, module_kind: ModuleKind, weight: Sequence[int]
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a layer's trained tensors by name, for a base weight of this shape."""
    *experts, outputs, inputs = weight
    rank = rule.rank
    match module_kind:
        case "linear":
            shapes = {"lora_a": (inputs, rank), "lora_b": (rank, outputs)}
        case "embedding":
            shapes = {"lora_a": (outputs, rank), "lora_b": (rank, inputs)}
        case "experts":
            shapes = {"lora_a": (*experts, rank, inputs), "lora_b": (*experts, outputs, rank)}
    magnitudes = {"m": (outputs,)} if rule.kind == "dora" else {}
    return shapes | magnitudes | ({"lora_bias": (outputs,)} if rule.bias else {})


def adapter_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """Return the adapter layers of a model by path, first block first."""
    modules = reversed(model.named_modules())
    return {path: module for path, module in modules if isinstance(module, AdapterLayer)}


def freeze_base(model: nn.Module) -> nn.Module:
    """Leave only adapter tensors trainable, in place, and return the model.

    In a model without adapters nothing stays trainable.
    """
    model.freeze()
    for layer in adapter_layers(model).values():
        layer.unfreeze(keys=list(layer.trainable), recurse=False)
    return model


def base_modules(model: nn.Module) -> dict[str, Any]:
    """Return all modules except adapter layers, by their paths in the model without adapters."""
    layers = adapter_layers(model)
    return {
        _path_without_adapters(path, layers): module
        for path, module in model.named_modules()
        if path not in layers
    }


def base_parameters(model: nn.Module) -> dict[str, mx.array]:
    """Return all parameters except the adapters', by their names in the model without adapters."""
    layers = adapter_layers(model)
    named: dict[str, mx.array] = {}
    for name, array in named_arrays(model.parameters()).items():
        module, _, leaf = name.rpartition(".")
        if module not in layers:
            named[f"{_path_without_adapters(module, layers)}.{leaf}"] = array
    return named


def _path_without_adapters(path: str, layers: Mapping[str, AdapterLayer]) -> str:
    """Return the path that a module of the adapted model has in the model without adapters."""
    outer, _, name = path.rpartition(".")
    return outer if name == "base" and outer in layers else path

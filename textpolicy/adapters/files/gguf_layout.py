"""Names and row order of the tensors in GGUF files, the files of llama.cpp.

llama.cpp rotates neighbouring rows of a head in some families, where mlx-lm rotates the first half
of the head with the second half. In files of these families the rows of queries and keys are in
another order.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from textpolicy.adapters.adapter import Adapter
from textpolicy.errors import AdapterError
from textpolicy.untrusted.bounds import MAX_LAYERS

# Names inside a block by the paths of the modules in mlx-lm.
BLOCK_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.switch_mlp.gate_proj": "ffn_gate_exps",
    "mlp.switch_mlp.up_proj": "ffn_up_exps",
    "mlp.switch_mlp.down_proj": "ffn_down_exps",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OTHER_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
ROUTER = "mlp.gate"
"""The end of the path of a module that chooses experts."""
_QUERIES, _KEYS = "self_attn.q_proj", "self_attn.k_proj"
_MODULE = re.compile(r"model\.layers\.(0|[1-9]\d{0,5})\.([\w.]+)")
_TENSOR = re.compile(r"blk\.(0|[1-9]\d{0,5})\.(\w+)")
_PATHS = {name: path for path, name in BLOCK_NAMES.items()}
_OTHER_PATHS = {name: path for path, name in OTHER_NAMES.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class GGUFFamily:
    """A family of models by llama.cpp's name. `model_class` names the file in mlx_lm.models.

    `rotates_pairs` is True if llama.cpp rotates neighbouring rows. `biases` names the modules of a
    block that may have a bias there. `has_experts` is True if each block has a mixture of experts.
    """

    name: str
    model_class: str
    rotates_pairs: bool
    biases: frozenset[str]
    has_experts: bool = False


_ATTENTION = frozenset({"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"})
_LINEAR = _ATTENTION | {"self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
_FAMILIES = (
    GGUFFamily(name="llama", model_class="llama", rotates_pairs=True, biases=_LINEAR),
    GGUFFamily(name="smollm3", model_class="smollm3", rotates_pairs=True, biases=_ATTENTION),
    GGUFFamily(name="qwen2", model_class="qwen2", rotates_pairs=False, biases=_ATTENTION),
    GGUFFamily(name="qwen3", model_class="qwen3", rotates_pairs=False, biases=_ATTENTION),
    GGUFFamily(
        name="qwen3moe",
        model_class="qwen3_moe",
        rotates_pairs=False,
        biases=_ATTENTION,
        has_experts=True,
    ),
)
FAMILIES = {family.name: family for family in _FAMILIES}
# mlx-lm has no class for mistral and takes that of llama.
_BY_MODEL_TYPE = {
    "mistral": FAMILIES["llama"],
    **{family.model_class: family for family in _FAMILIES},
}
MODEL_TYPES = tuple(_BY_MODEL_TYPE)
"""The `model_type` of each model that can be written as GGUF."""


def family_of(model_type: object) -> GGUFFamily | None:
    """Return the family of a model by the `model_type` of its config, or None."""
    return _BY_MODEL_TYPE.get(str(model_type))


def family_of_model(model: nn.Module) -> GGUFFamily | None:
    """Return the family of a model by its class in mlx-lm, or None."""
    name = type(model).__module__.removeprefix("mlx_lm.models.")
    return next((family for family in _FAMILIES if family.model_class == name), None)


@dataclass(frozen=True, slots=True)
class Heads:
    """How many heads the queries and the keys of a model have."""

    queries: int
    keys: int

    @classmethod
    def of(cls, architecture: Mapping[str, Any]) -> "Heads":
        """Return the numbers of heads that a config.json names."""
        queries = architecture["num_attention_heads"]
        return cls(queries, architecture.get("num_key_value_heads") or queries)

    def rotated_in(self, path: str) -> int | None:
        """Return the number of heads of a module whose output is rotated, or None for another."""
        by_module = {_QUERIES: self.queries, _KEYS: self.keys}
        return next((heads for name, heads in by_module.items() if path.endswith(name)), None)


def tensor_name(path: str) -> str | None:
    """Return the name of a module's tensor in GGUF files, without ".weight", or None."""
    if match := _MODULE.fullmatch(path):
        inside = BLOCK_NAMES.get(match[2])
        return inside and f"blk.{match[1]}.{inside}"
    return OTHER_NAMES.get(path)


def module_path(name: str) -> str | None:
    """Return the path of the module in mlx-lm, the inverse of `tensor_name`, or None."""
    if match := _TENSOR.fullmatch(name):
        inside = _PATHS.get(match[2])
        known = inside is not None and int(match[1]) < MAX_LAYERS
        return f"model.layers.{match[1]}.{inside}" if known else None
    return _OTHER_PATHS.get(name)


def to_pairs(rows: mx.array, heads: int) -> mx.array:
    """Return rows in llama.cpp's order: the two that are rotated together are neighbours."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1)
    return halves.swapaxes(1, 2).reshape(rows.shape)


def to_halves(rows: mx.array, heads: int) -> mx.array:
    """Return rows in mlx-lm's order, the inverse of `to_pairs`."""
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, -1)
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def restore_row_order(adapter: Adapter, heads: Heads) -> Adapter:
    """Return an adapter whose rows are in llama.cpp's order with the rows in mlx-lm's order."""
    arrays = dict(adapter.arrays)
    for name, factor in arrays.items():
        module, _, kind = name.rpartition(".")
        count = heads.rotated_in(module) if kind == "lora_b" else None
        if count is None:
            continue
        if factor.shape[1] % (2 * count):
            raise AdapterError(
                f"{adapter.origin}: {name} has {factor.shape[1]} outputs, which are not {count} "
                "heads of an even size. Was it made for another model?"
            )
        arrays[name] = to_halves(factor.T, count).T
    return replace(adapter, arrays=arrays, rows_in_pairs=False)


def with_row_order_for(model: nn.Module, adapter: Adapter) -> Adapter:
    """Return the adapter with the rows in the order of the model that it is for."""
    if not adapter.rows_in_pairs:
        return adapter
    family = family_of_model(model)
    if family is None or not family.rotates_pairs:
        raise AdapterError(
            f"{adapter.origin} is for a model of llama.cpp's architecture llama, and this model is "
            f"a {type(model).__module__}.{type(model).__name__}"
        )
    args = cast(Any, model).args
    return restore_row_order(adapter, Heads(args.num_attention_heads, args.num_key_value_heads))

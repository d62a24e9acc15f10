"""read_gguf_model: the model in a GGUF file, from the file's own tensors and metadata."""

import mmap
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.rope_utils import Llama3RoPE

from textpolicy.adapters.files.gguf_file import GGUFContent, parse_gguf
from textpolicy.adapters.files.gguf_layout import (
    FAMILIES,
    GGUFFamily,
    Heads,
    module_path,
    to_halves,
)
from textpolicy.errors import ModelError, UnreadableError
from textpolicy.export.gguf.model_metadata import plain_periods
from textpolicy.untrusted.files import open_regular

_ROPE_FACTORS = "rope_freqs.weight"


def read_gguf_model(path: str | Path) -> nn.Module:
    """Return the model in a file that `write_gguf` wrote, in float32, in eval mode.

    It is made only from the file, so it shows what a reader of the file computes.
    """
    path = Path(path)
    try:
        # Memory-mapped: the tensors of a large model are read one at a time.
        with open_regular(path) as file:
            content = parse_gguf(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))
        return _build(content)
    except (UnreadableError, KeyError, ValueError) as error:
        raise ModelError(
            f"{path} cannot be read as a GGUF model: {error}. Export the model again"
        ) from error


def _build(content: GGUFContent) -> nn.Module:
    family = FAMILIES[content.metadata["general.architecture"]]
    prefix = f"{family.name}."
    values = {
        key.removeprefix(prefix): value
        for key, value in content.metadata.items()
        if key.startswith(prefix)
    }
    module = cast(Any, import_module(f"mlx_lm.models.{family.model_class}"))
    config = _config(family, values, content)
    model: nn.Module = module.Model(module.ModelArgs.from_dict(config))
    weights = _weights(family, Heads.of(config), content)
    _make_biases(model, weights)
    model.load_weights(list(weights.items()), strict=True)
    if _ROPE_FACTORS in content.tensors:
        _scale_rotation(model, content.tensors[_ROPE_FACTORS].read(), config)
    mx.eval(model.parameters())
    return model.eval()


def _config(family: GGUFFamily, values: Mapping[str, Any], content: GGUFContent) -> dict[str, Any]:
    """Return the config of mlx-lm's model."""
    config = {
        "model_type": family.model_class,
        "num_hidden_layers": values["block_count"],
        "max_position_embeddings": values["context_length"],
        "hidden_size": values["embedding_length"],
        "intermediate_size": values["feed_forward_length"],
        "num_attention_heads": values["attention.head_count"],
        "num_key_value_heads": values["attention.head_count_kv"],
        "head_dim": values["attention.key_length"],
        "rms_norm_eps": values["attention.layer_norm_rms_epsilon"],
        "rope_theta": values["rope.freq_base"],
        "rope_scaling": _scaling(values),
        "vocab_size": values["vocab_size"],
        "tie_word_embeddings": "output.weight" not in content.tensors,
    }
    if family.has_experts:
        config |= {
            "num_experts": values["expert_count"],
            "num_experts_per_tok": values["expert_used_count"],
            "moe_intermediate_size": values["expert_feed_forward_length"],
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    return config


def _scaling(values: Mapping[str, Any]) -> dict[str, Any] | None:
    if (kind := values.get("rope.scaling.type")) is None:
        return None
    scaling: dict[str, Any] = {"rope_type": kind, "factor": values["rope.scaling.factor"]}
    if (original := values.get("rope.scaling.original_context_length")) is not None:
        scaling["original_max_position_embeddings"] = original
    return scaling


def _weights(family: GGUFFamily, heads: Heads, content: GGUFContent) -> dict[str, mx.array]:
    """Return the tensors with mlx-lm's names and order of rows."""
    weights: dict[str, mx.array] = {}
    for name, tensor in content.tensors.items():
        if name == _ROPE_FACTORS:
            continue
        part, _, kind = name.rpartition(".")
        if (path := module_path(part)) is None:
            raise UnreadableError(f"the tensor {name!r} is of no module that is known here")
        rotated = heads.rotated_in(path) if family.rotates_pairs else None
        array = tensor.read()
        weights[f"{path}.{kind}"] = to_halves(array, rotated) if rotated else array
    return weights


def _make_biases(model: nn.Module, weights: Mapping[str, mx.array]) -> None:
    """Give each module a bias for which the file has one, and none to others."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            bias = weights.get(f"{path}.bias")
            if bias is not None:
                module.bias = mx.zeros(bias.shape)
            else:
                module.pop("bias", None)


def _scale_rotation(model: nn.Module, factors: mx.array, config: Mapping[str, Any]) -> None:
    """Rotate with the file's own factors, by which llama.cpp divides the frequencies."""
    size, base = config["head_dim"], config["rope_theta"]
    for layer in cast(Any, model).layers:
        rope: Any = Llama3RoPE(size, base=base, scaling_config={"factor": 1.0})
        rope._freqs = plain_periods(size, base) * factors
        layer.self_attn.rope = rope

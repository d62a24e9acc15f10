"""What a GGUF file says about the shape of a model, so that llama.cpp computes what mlx-lm does."""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from textpolicy.adapters.files.gguf_layout import MODEL_TYPES, GGUFFamily, family_of_model
from textpolicy.errors import ModelError
from textpolicy.export.gguf.gguf_package import Metadata

_ADVICE = "Export the model in the format mlx or hf instead"
_KNOWN_SCALING = {
    "linear": {"factor"},
    "llama3": {
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    },
    "yarn": {"factor", "original_max_position_embeddings"},
}
_DEFAULT_YARN_CONTEXT = 4096
"""What mlx-lm takes for original_max_position_embeddings if the config does not name it."""


def checked_family(model: nn.Module) -> GGUFFamily:
    """Return the family of a model. Raise ModelError if llama.cpp would compute something else."""
    family = family_of_model(model)
    if family is None:
        raise ModelError(
            f"a GGUF file cannot be written for {type(model).__module__}; supported model types "
            f"are {', '.join(MODEL_TYPES)}. {_ADVICE}"
        )
    args: Any = model.args
    problems: list[str] = []
    if vars(args).get("rope_traditional"):
        problems.append("rope_traditional is set")
    others = set(vars(args).get("layer_types") or ()) - {"full_attention"}
    if others:
        problems.append(f"its layers have the types {sorted(others)}")
    if family.name == "smollm3" and list(args.no_rope_layers) != _llama_cpp_layers(args):
        problems.append(f"its no_rope_layers are {args.no_rope_layers}")
    if family.has_experts:
        problems += _expert_problems(args)
    scaling = rope_scaling(args)
    if scaling and scaling["rope_type"] == "llama3" and not family.rotates_pairs:
        problems.append("its positions are scaled as those of Llama 3")
    if scaling and (unknown := set(scaling) - {"rope_type"} - _KNOWN_SCALING[scaling["rope_type"]]):
        problems.append(f"its rope_scaling has the options {sorted(unknown)}")
    if problems:
        raise ModelError(
            f"llama.cpp would not compute this model as mlx-lm does: {', and '.join(problems)}. "
            f"{_ADVICE}"
        )
    return family


def _expert_problems(args: Any) -> list[str]:
    """Return what llama.cpp has no option for in a mixture of experts."""
    plain = {
        "norm_topk_prob": (True,),
        "decoder_sparse_step": (1,),
        "mlp_only_layers": ([], None),
        # mlx-lm ignores it here, and llama.cpp would not.
        "rope_scaling": (None,),
    }
    values = vars(args)
    return [f"its {key} is {values[key]!r}" for key in plain if values[key] not in plain[key]]


def _llama_cpp_layers(args: Any) -> list[int]:
    """Return which layers of a SmolLM3 llama.cpp rotates: all but every fourth."""
    return [int(number % 4 != 0) for number in range(1, args.num_hidden_layers + 1)]


def rope_scaling(args: Any) -> Mapping[str, Any] | None:
    """Return the scaling of positions with its kind as "rope_type", or None without scaling."""
    given: Mapping[str, Any] = args.rope_scaling or {}
    kind = given.get("type") or given.get("rope_type", "default")
    if kind == "default":
        return None
    if kind not in _KNOWN_SCALING:
        raise ModelError(
            f"the model scales positions by {kind!r}, and only {', '.join(_KNOWN_SCALING)} can be "
            f"written to GGUF. {_ADVICE}"
        )
    plain = {k: v for k, v in given.items() if k not in ("type", "rope_type", "rope_theta")}
    return {"rope_type": kind, **plain}


def head_size(args: Any) -> int:
    """Return the size of an attention head."""
    return vars(args).get("head_dim") or args.hidden_size // args.num_attention_heads


def model_metadata(family: GGUFFamily, args: Any, context: int) -> Metadata:
    """Return the metadata of the model without that of its tokenizer."""
    size = head_size(args)
    values: dict[str, int | float | str] = {
        "block_count": args.num_hidden_layers,
        "context_length": context,
        "embedding_length": args.hidden_size,
        "feed_forward_length": args.intermediate_size,
        "attention.head_count": args.num_attention_heads,
        "attention.head_count_kv": args.num_key_value_heads,
        "attention.key_length": size,
        "attention.value_length": size,
        "attention.layer_norm_rms_epsilon": float(args.rms_norm_eps),
        "rope.dimension_count": size,
        "rope.freq_base": float(args.rope_theta),
        "vocab_size": args.vocab_size,
    }
    if family.has_experts:
        values |= {
            "expert_count": args.num_experts,
            "expert_used_count": args.num_experts_per_tok,
            "expert_feed_forward_length": args.moe_intermediate_size,
        }
    scaling = rope_scaling(args)
    if scaling and scaling["rope_type"] != "llama3":
        values["rope.scaling.type"] = scaling["rope_type"]
        values["rope.scaling.factor"] = float(scaling["factor"])
    if scaling and scaling["rope_type"] == "yarn":
        original = scaling.get("original_max_position_embeddings", _DEFAULT_YARN_CONTEXT)
        values["rope.scaling.original_context_length"] = original
    return {f"{family.name}.{key}": value for key, value in values.items()}


def rope_factors(model: nn.Module) -> mx.array | None:
    """Return what llama.cpp divides the frequencies by, for the scaling of Llama 3, or None."""
    llama: Any = model
    scaling = rope_scaling(llama.args)
    if scaling is None or scaling["rope_type"] != "llama3":
        return None
    periods = llama.layers[0].self_attn.rope._freqs
    return periods / plain_periods(head_size(llama.args), llama.args.rope_theta)


def plain_periods(size: int, base: float) -> mx.array:
    """Return the periods of the rotation of each pair, divided by two pi, without scaling."""
    return base ** (mx.arange(0, size, 2, dtype=mx.float32) / size)

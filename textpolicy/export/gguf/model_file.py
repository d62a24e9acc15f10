"""write_gguf: a model without adapters as one GGUF file, with its tokenizer."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from textpolicy.adapters.files.gguf_layout import (
    ROUTER,
    GGUFFamily,
    Heads,
    tensor_name,
    to_pairs,
)
from textpolicy.adapters.layers.adapter_layer import adapter_layers
from textpolicy.adapters.quantization.stored_weights import (
    float_weight,
    module_kind,
    weight_shape,
)
from textpolicy.errors import ConfigError, ModelError
from textpolicy.export.gguf.gguf_package import (
    NUMBER_FORMATS,
    Metadata,
    TensorToWrite,
    import_gguf,
    tensor_in_memory,
    write_gguf_file,
)
from textpolicy.export.gguf.model_metadata import checked_family, model_metadata, rope_factors
from textpolicy.export.gguf.tokenizer_metadata import tokenizer_metadata

_ADVICE = "Export the model in the format mlx or hf instead"
_Q8_0_BLOCK = 32


def write_gguf(
    path: str | Path,
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    architecture: Mapping[str, Any],
    *,
    number_format: str = "f32",
    name: str | None = None,
) -> Path:
    """Write a model without adapters for llama.cpp, replacing the file in one step.

    Returns the path. `architecture` is the content of config.json. Quantized weights are
    dequantized first. Matrices are stored as "f32", "f16", "bf16" or "q8_0"; vectors are always
    f32. Raise ModelError for all that llama.cpp would not compute as mlx-lm does.
    """
    if number_format not in NUMBER_FORMATS:
        raise ConfigError(
            f"number_format is {number_format!r}; expected one of {', '.join(NUMBER_FORMATS)}"
        )
    gguf = import_gguf()
    family = checked_family(model)
    args: Any = model.args
    file_type = "ALL_F32" if number_format == "f32" else f"MOSTLY_{number_format.upper()}"
    metadata: Metadata = {
        "general.type": "model",
        "general.name": name or str(architecture.get("_name_or_path") or family.name),
        "general.file_type": int(gguf.LlamaFileType[file_type]),
        **model_metadata(family, args, _context(args, tokenizer)),
        **tokenizer_metadata(tokenizer, args.vocab_size),
    }
    tensors = _plan_tensors(model, family, number_format)
    return write_gguf_file(Path(path), family.name, metadata, tensors)


def _context(args: Any, tokenizer: TokenizerWrapper) -> int:
    length = args.max_position_embeddings or cast(Any, tokenizer).model_max_length
    if not 0 < length < 2**31:
        raise ModelError(
            "the model does not say how long a text may be. Write max_position_embeddings into its "
            "config.json"
        )
    return length


def _plan_tensors(
    model: nn.Module, family: GGUFFamily, number_format: str
) -> dict[str, TensorToWrite]:
    """Return the tensors by their names. Raise ModelError with all that have no place in a file."""
    if adapters := adapter_layers(model):
        raise ModelError(
            f"The model has adapters ({min(adapters)} and {len(adapters) - 1} more). Fuse them "
            "first: AdapterContainer.of(model).fuse()"
        )
    args: Any = model.args
    heads = Heads(args.num_attention_heads, args.num_key_value_heads)
    tensors: dict[str, TensorToWrite] = {}
    problems: list[str] = []
    if (factors := rope_factors(model)) is not None:
        tensors["rope_freqs.weight"] = tensor_in_memory(factors)
    for path, module in model.named_modules():
        if "weight" not in module:
            continue
        name = tensor_name(path)
        rotated = heads.rotated_in(path) if family.rotates_pairs else None
        problems += _problems(path, module, family, name, number_format)
        if module_kind(module) is None:
            tensors[f"{name}.weight"] = tensor_in_memory(module["weight"])
            continue
        tensors[f"{name}.weight"] = TensorToWrite(
            shape=weight_shape(module),
            # Rounding could choose other experts.
            number_format="f32" if path.endswith(ROUTER) else number_format,
            read=partial(_ordered_weight, module, rotated),
        )
        if "bias" in module:
            bias = module["bias"]
            tensors[f"{name}.bias"] = tensor_in_memory(to_pairs(bias, rotated) if rotated else bias)
    if problems:
        shown = [*problems[:8], *([f"... and {len(problems) - 8} more"] if problems[8:] else [])]
        raise ModelError(
            "This model cannot be written to GGUF\n  " + "\n  ".join(shown) + f"\n{_ADVICE}"
        )
    return tensors


def _problems(
    path: str, module: nn.Module, family: GGUFFamily, name: str | None, number_format: str
) -> list[str]:
    """Return why a module cannot be written, or nothing."""
    if name is None:
        return [f"{path}: it has no name in GGUF files of {family.name}"]
    inside = path.partition("layers.")[2].partition(".")[2]
    if "bias" in module and inside not in family.biases:
        return [f"{path}: llama.cpp has no bias there"]
    kind = module_kind(module)
    if kind and number_format == "q8_0" and weight_shape(module)[-1] % _Q8_0_BLOCK:
        return [
            f"{path}: its rows have {weight_shape(module)[-1]} weights, not a multiple of "
            f"{_Q8_0_BLOCK}; choose f16 or bf16 instead of q8_0"
        ]
    return []


def _ordered_weight(module: nn.Module, rotated: int | None) -> mx.array:
    weight = float_weight(module)
    return to_pairs(weight, rotated) if rotated else weight

"""Folders with the adapter merged into the weights, for mlx-lm, LM Studio and Transformers."""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import save_config, save_model
from safetensors import safe_open

from textpolicy.activity import doing
from textpolicy.adapters.fuse import SAME_FORMAT
from textpolicy.adapters.quantization.packed_product import use_fast_products
from textpolicy.adapters.quantization.quantize import dequantize, model_quantization
from textpolicy.adapters.quantization.stored_weights import is_quantized, module_kind
from textpolicy.backend import versions
from textpolicy.errors import AdapterError, ExportError
from textpolicy.export.job import Job
from textpolicy.export.proof import LogProbabilities, Opened, log_probabilities_of
from textpolicy.export.q8_0 import survival_in_q8_0
from textpolicy.generation.prompts import encode_prompt

# The files of a checkpoint that are neither weights nor its config.
_COPIED = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "added_tokens.json"),
    *("special_tokens_map.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.json"),
    *("chat_template.jinja", "*.model", "*.tiktoken"),
)


def merge(job: Job, *, keep_quantization: bool) -> None:
    """Merge the adapter into the weights of the job's model, all of them in the job's dtype.

    With `keep_quantization`, the modules of a quantized base stay in their number format.
    """
    keep = job.base_is_quantized and keep_quantization
    with doing("merging the adapter"):
        try:
            least = job.options.min_survival
            if job.weight_format == "q8_0":
                job.survival = survival_in_q8_0(job.adapters)
                job.survival.check(least)
            fused = job.adapters.fuse(
                dtype=job.dtype, qtype=SAME_FORMAT if keep else None, min_survival=least
            )
            job.survival = job.survival or fused
        except AdapterError as error:
            more_bits = "--dequantize" if keep else "--dtype float32"
            alone = (
                "" if job.base_is_quantized else ", or export an adapter: --to peft, --to mlx-lm"
            )
            raise ExportError(
                f"{error}\nOn the command line, pass {more_bits} or --min-survival 0{alone}"
            ) from error
        # An adapter of all quantized modules has left none.
        if not keep and job.base_is_quantized:
            dequantize(job.model, job.dtype)
        job.model.set_dtype(job.dtype)
        mx.eval(job.model.parameters())


def new_biases(job: Job) -> list[str]:
    """Return the modules to which merging would give a bias that they do not have in the model."""
    return [
        path
        for path, layer in job.adapters.layers().items()
        if layer.merged_bias() is not None and "bias" not in layer.base
    ]


def refuse_new_biases(job: Job) -> None:
    """Raise `ExportError` if merging would give a bias to modules that have none in the model."""
    if new := new_biases(job):
        raise ExportError(
            f"the adapter trains a bias for {new[0]} and {len(new) - 1} more modules, and these "
            "modules have no bias in this kind of model. Export the adapter for PEFT, which can "
            "hold such a bias: --to peft"
        )


def refuse_unknown_quantization(job: Job) -> None:
    """Raise `ExportError` if mlx-lm cannot load the quantization of the base."""
    refuse_new_biases(job)
    if job.options.dequantize or not job.base_is_quantized:
        return
    quantization = model_quantization(job.model)
    if quantization is None or quantization["mode"] == "nf4":
        raise ExportError(
            "mlx-lm cannot load the quantization of this base model: it is NF4, or several number "
            "formats in one model. Write the weights as floats: --dequantize"
        )


def write_mlx(job: Job, folder: Path) -> None:
    """Write a folder that mlx-lm loads. A quantized base stays quantized, unless asked otherwise.

    The folder has the layout of mlx-lm, and nothing of it belongs to TextPolicy.
    """
    merge(job, keep_quantization=not job.options.dequantize)
    config = _config_without_quantization(job)
    if quantization := model_quantization(job.model):
        config |= {"quantization": quantization}
    _write_folder(job, folder, config)


def write_hf(job: Job, folder: Path) -> None:
    """Write a folder of float weights in the layout of Transformers."""
    merge(job, keep_quantization=False)
    _check_names(job)
    _write_folder(job, folder, _config_without_quantization(job))
    if job.checkpoint_is_quantized:
        job.notes.append(
            "The checkpoint of the base is quantized, so the float weights hold its rounding. The "
            "float model that it was made of is another one."
        )


def refuse_experts(job: Job) -> None:
    """Raise `ExportError` if the model has experts, whose weights mlx-lm stacks while loading."""
    refuse_new_biases(job)
    if has_experts(job):
        raise ExportError(
            "mlx-lm stacks the weights of the experts of this model while loading, and "
            "Transformers has them otherwise. Export the merged model for mlx-lm: --to mlx"
        )


def reopen_with_mlx_lm(job: Job, folder: Path) -> Iterator[Opened]:
    """Load the folder as any program does that uses mlx-lm, and compute in the job's precision."""
    config = {"trust_remote_code": False}
    with doing("opening the export again"):
        model, tokenizer, *_ = mlx_lm.load(str(folder), tokenizer_config=config)
        check_tokens(job, tokenizer)
    yield Opened(compute=in_precision_of(job, model), by=f"mlx-lm {versions()['mlx-lm']}")


def in_precision_of(job: Job, model: nn.Module) -> LogProbabilities:
    """Return the log-probabilities of a model in the arithmetic in which the job was measured."""
    if precision_of(job) == mx.float32:
        model.set_dtype(mx.float32)
    use_fast_products(model)
    return log_probabilities_of(model)


def precision_of(job: Job) -> mx.Dtype:
    """Return the dtype that the trained model was measured in."""
    if job.source.dtype:
        return job.source.dtype
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    return mx.float32 if on_cpu else mx.bfloat16


def check_tokens(job: Job, tokenizer: TokenizerWrapper) -> None:
    """Raise `ExportError` if a tokenizer encodes the prompts otherwise than that of the base."""
    for prompt, expected in job.prompts:
        found = encode_prompt(tokenizer, prompt, chat_template_kwargs=job.asking.arguments)
        if list(found) != list(expected):
            raise ExportError(
                f"the tokenizer that was written encodes a prompt in {len(found)} tokens otherwise "
                f"than that of the base, which needs {len(expected)}. Nothing was kept"
            )


def merged_bytes(job: Job, *, keep_quantization: bool) -> int:
    """Return the bytes of the merged weights."""
    size = 1.1 if job.weight_format == "q8_0" else float(job.dtype.size)
    return sum(
        _stored_bytes(module, size, keep_quantization=keep_quantization)
        for _, module in job.model.named_modules()
    )


def _stored_bytes(module: nn.Module, size: float, *, keep_quantization: bool) -> int:
    own = {name: value for name, value in module.items() if isinstance(value, mx.array)}
    if not is_quantized(module):
        return int(sum(value.size * size for value in own.values()))
    if keep_quantization:
        return sum(value.nbytes for value in own.values())
    packed = own["weight"]
    return int(packed.nbytes * 8 / cast(Any, module).bits * size)


def _config_without_quantization(job: Job) -> dict[str, Any]:
    """Return the config of the checkpoint, with the dtype that is written."""
    dropped = ("quantization", "quantization_config", "torch_dtype", "dtype")
    config = {name: value for name, value in job.architecture.items() if name not in dropped}
    # Older programs read the first name only.
    named = "torch_dtype" if "torch_dtype" in job.architecture else "dtype"
    return config | {named: job.weight_format}


def _write_folder(job: Job, folder: Path, config: Mapping[str, Any]) -> None:
    with doing("writing the model"):
        save_model(folder, job.model)
        save_config(dict(config), folder / "config.json")
        copy_small_files(job.source.checkpoint, folder)


def copy_small_files(checkpoint: Path, folder: Path) -> None:
    """Copy the tokenizer, the chat template and the settings of generation as they are."""
    for pattern in _COPIED:
        for path in checkpoint.glob(pattern):
            shutil.copyfile(path, folder / path.name)


def has_experts(job: Job) -> bool:
    """Return whether the model is a mixture of experts."""
    return any(module_kind(module) == "experts" for module in job.model.modules())


def _check_names(job: Job) -> None:
    """Raise `ExportError` if mlx-lm has changed the names of the weights while loading them."""
    stored: set[str] = set()
    for path in job.source.checkpoint.glob("*.safetensors"):
        with safe_open(path, "np") as file:
            stored |= set(file.keys())
    weights = cast(Mapping[str, mx.array], dict(tree_flatten(job.model.parameters())))
    if other := sorted(weights.keys() - stored):
        raise ExportError(
            f"mlx-lm holds {other[0]} and {len(other) - 1} more weights by names that the "
            "checkpoint does not have, so Transformers would not find them. Export the merged "
            "model for mlx-lm: --to mlx"
        )

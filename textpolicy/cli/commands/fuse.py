"""`textpolicy fuse`: adapters added into the weights, as a model that mlx-lm loads."""

import json
import os
import shutil
import tempfile
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import save_config, save_model

from textpolicy.adapters.fuse import SAME, FuseReport
from textpolicy.adapters.quantization.quantize import dequantize, model_quantization
from textpolicy.adapters.quantization.stored_weights import is_quantized
from textpolicy.cli.answer import Report, table
from textpolicy.cli.flags import configured
from textpolicy.config import TrainConfig
from textpolicy.config.sections import ModelOptions
from textpolicy.errors import AdapterError, ConfigError, ModelError
from textpolicy.experiment.assembly import DTYPES, apply_thread_option, dtype_of
from textpolicy.generation.lora import adapters_of
from textpolicy.generation.mlx_generation import load_model
from textpolicy.generation.model_files import find_model

_COPIED = ("generation_config.json",)


def run(options: Namespace) -> Report:
    config = configured(TrainConfig(), options)
    apply_thread_option(config.model)
    start, output = config.adapter.start, options.output
    if start is None:
        raise ConfigError("name the adapters to fuse: --adapter PATH")
    if output.exists() and any(output.iterdir()):
        raise ConfigError(f"{output} is not empty; name a folder that is yet to be made")
    folder = find_model(config.model.name)
    architecture = json.loads((folder / "config.json").read_text("utf-8"))
    model, tokenizer = load_model(
        config.model.name, start, dtype=_dtype(config.model, architecture)
    )
    fused = _fuse(model, dequantized=options.dequantize, min_survival=options.min_survival)
    written = _with_quantization(architecture, model)
    _write(output, model, tokenizer, written, folder)
    data = {
        "output": str(output),
        "survival": fused.survival,
        "noise": fused.noise,
        "modules": [asdict(module) for module in fused.modules],
        "quantization": written.get("quantization"),
    }
    return Report(data=data, text=_text(fused, output))


def _dtype(options: ModelOptions, architecture: dict[str, Any]) -> mx.Dtype | None:
    """What was asked for, or what the checkpoint is in: fusing is no reason to change it."""
    stored = str(architecture.get("dtype") or architecture.get("torch_dtype"))
    return dtype_of(options) or DTYPES.get(stored)


def _fuse(model: nn.Module, *, dequantized: bool, min_survival: float) -> FuseReport:
    adapters = adapters_of(model)
    packed = any(is_quantized(module) for module in model.modules())
    again = SAME if packed and not dequantized else None
    try:
        report = adapters.fuse(qtype=again, min_survival=min_survival)
    except AdapterError as error:
        raise AdapterError(
            f"{error}\nOn the command line: --dequantize, --dtype float32 or --min-survival 0"
        ) from error
    if dequantized and any(is_quantized(module) for module in model.modules()):
        dequantize(model)
    return report


def _with_quantization(architecture: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The config of the model as it is now."""
    plain = {
        name: value
        for name, value in architecture.items()
        if name not in ("quantization", "quantization_config")
    }
    if not any(is_quantized(module) for module in model.modules()):
        return plain
    quantization = model_quantization(model)
    if quantization is None or quantization["mode"] == "nf4":
        raise ModelError(
            "the base is quantized in a way that mlx-lm cannot load: NF4, or several formats at "
            "once; write it in floats, --dequantize"
        )
    return plain | {"quantization": quantization}


def _write(
    output: Path,
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    config: dict[str, Any],
    source: Path,
) -> None:
    """The whole folder, or nothing: it gets its name when it is complete."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".fuse-") as kept:
        folder = Path(kept) / output.name
        save_model(folder, model)
        save_config(dict(config), folder / "config.json")
        tokenizer.save_pretrained(folder)
        for name in _COPIED:
            if (source / name).is_file():
                shutil.copy(source / name, folder / name)
        os.replace(folder, output)


def _text(fused: FuseReport, output: Path) -> str:
    worst = fused.worst
    rows = [
        ("model", f"{output}"),
        ("modules", f"{len(fused.modules)} fused into {worst.dtype}"),
        ("survived", f"{fused.survival:.1%} of the update, with noise of {fused.noise:.1%}"),
        ("worst", f"{worst.path}: {worst.survival:.1%}"),
    ]
    return table(rows)

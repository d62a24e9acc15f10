"""`textpolicy fuse`: add adapters into the weights and write a model that mlx-lm loads."""

import os
import shutil
import tempfile
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import save_config, save_model

from textpolicy.activity import doing
from textpolicy.adapters.fuse import SAME_FORMAT, FuseReport
from textpolicy.adapters.quantization.quantize import dequantize, model_quantization
from textpolicy.adapters.quantization.stored_weights import is_quantized
from textpolicy.cli.answer import Answer, table
from textpolicy.cli.flags import configured
from textpolicy.config import TrainConfig
from textpolicy.errors import AdapterError, ConfigError, ModelError
from textpolicy.experiment.assembly import DTYPES, apply_thread_option, dtype_of
from textpolicy.generation.lora import adapters_of
from textpolicy.generation.mlx_generation import load_model
from textpolicy.generation.model_files import find_model, read_architecture_file

_COPIED = ("generation_config.json",)


def run(options: Namespace) -> Answer:
    config = configured(TrainConfig(), options)
    apply_thread_option(config.model)
    start, output = config.adapter.start, options.output
    if start is None:
        raise ConfigError("no adapters were named; name the adapters to fuse: --adapter PATH")
    if output.exists() and any(output.iterdir()):
        raise ConfigError(
            f"the folder {output} is not empty; name a folder that does not exist yet"
        )
    folder = find_model(config.model.name)
    architecture = read_architecture_file(folder)
    stored = str(architecture.get("dtype") or architecture.get("torch_dtype"))
    dtype = dtype_of(config.model) or DTYPES.get(stored)
    model, tokenizer = load_model(config.model.name, start, dtype=dtype)
    fused = _fuse(model, to_float=options.dequantize, min_survival=options.min_survival)
    written = _fused_config(architecture, model)
    _write_model(output, model, tokenizer, written, folder)
    data = {
        "output": str(output),
        "survival": fused.survival,
        "noise": fused.noise,
        "modules": [asdict(module) for module in fused.modules],
        "quantization": written.get("quantization"),
    }
    return Answer(data=data, text=_report_text(fused, output))


@doing("merging the adapters", begins=True)
def _fuse(model: nn.Module, *, to_float: bool, min_survival: float) -> FuseReport:
    adapters = adapters_of(model)
    requantize = SAME_FORMAT if _has_quantized_weights(model) and not to_float else None
    try:
        report = adapters.fuse(qtype=requantize, min_survival=min_survival)
    except AdapterError as error:
        raise AdapterError(
            f"{error}\nOn the command line, pass --dequantize, --dtype float32 or --min-survival 0"
        ) from error
    if to_float and _has_quantized_weights(model):
        dequantize(model)
    return report


def _has_quantized_weights(model: nn.Module) -> bool:
    return any(is_quantized(module) for module in model.modules())


def _fused_config(architecture: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return the checkpoint's config with the quantization that the fused model has."""
    plain = {
        name: value
        for name, value in architecture.items()
        if name not in ("quantization", "quantization_config")
    }
    if not _has_quantized_weights(model):
        return plain
    quantization = model_quantization(model)
    if quantization is None or quantization["mode"] == "nf4":
        raise ModelError(
            "mlx-lm cannot load the quantization of this base model: it is NF4, or several "
            "formats in one model; write the weights as floats: --dequantize"
        )
    return plain | {"quantization": quantization}


def _write_model(
    output: Path,
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    config: dict[str, Any],
    source: Path,
) -> None:
    """Write the folder under a temporary name, and rename it when it is complete."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".fuse-") as temporary:
        folder = Path(temporary) / output.name
        save_model(folder, model)
        save_config(dict(config), folder / "config.json")
        tokenizer.save_pretrained(folder)
        for name in _COPIED:
            if (source / name).is_file():
                shutil.copy(source / name, folder / name)
        os.replace(folder, output)


def _report_text(fused: FuseReport, output: Path) -> str:
    worst = fused.worst
    rows = [
        ("model", f"{output}"),
        ("modules", f"{len(fused.modules)} fused into {worst.dtype}"),
        ("survived", f"{fused.survival:.1%} of the update, with noise of {fused.noise:.1%}"),
        ("worst", f"{worst.path}: {worst.survival:.1%}"),
    ]
    return table(rows)

"""What is exported: an adapter, the base model that it belongs to, and the run that trained it."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from textpolicy.adapters.adapter import Adapter
from textpolicy.adapters.config.adapter_config import config_for_modules
from textpolicy.adapters.container import AdapterContainer
from textpolicy.adapters.files.layouts import read_adapter
from textpolicy.adapters.quantization.quantize import dequantize
from textpolicy.adapters.quantization.stored_weights import is_quantized
from textpolicy.errors import ConfigError
from textpolicy.experiment.assembly import DTYPES
from textpolicy.generation.mlx_generation import load_model
from textpolicy.generation.model_files import find_model, read_architecture_file
from textpolicy.runs import RunDirectory, find_adapter
from textpolicy.runs.named_adapter import run_of_adapter


@dataclass(frozen=True, kw_only=True)
class Source:
    """An adapter on disk and its base. `directory` is the run that trained it, if it is known."""

    adapter: Path
    model: str
    dtype: mx.Dtype | None = None
    directory: RunDirectory | None = None

    @property
    def checkpoint(self) -> Path:
        """The folder of the base model."""
        return find_model(self.model)

    @property
    def model_name(self) -> str:
        """The name of the base model without the folders of this machine."""
        folder = Path(self.model).expanduser()
        return folder.resolve().name if folder.is_dir() else self.model

    @property
    def is_on_hub(self) -> bool:
        """Whether other programs find the base model by the same name, on a hub."""
        return self.model != "tiny" and not Path(self.model).expanduser().is_dir()

    @property
    def name(self) -> str:
        """The name of what is exported: that of the run, or of the adapter file or folder."""
        return self.directory.path.name if self.directory else self.adapter.absolute().stem

    def architecture(self) -> dict[str, Any]:
        """Return the config.json of the base model."""
        return read_architecture_file(self.checkpoint)

    def load(self) -> tuple[nn.Module, TokenizerWrapper]:
        """Return the model with the adapter as it was trained, and the tokenizer."""
        return load_model(self.model, self.adapter, dtype=self.dtype)

    def load_over_float_base(self, adapter: Path) -> nn.Module:
        """Return the model with its weights as floats and an adapter on disk over them."""
        model, _ = load_model(self.model, dtype=self.dtype)
        if any(is_quantized(module) for module in model.modules()):
            dequantize(model)
        read = _without_quantization(read_adapter(adapter))
        AdapterContainer.from_adapter(read).load(model)
        return model


def find_source(path: str | Path, *, model: str | None = None) -> Source:
    """Return the adapter of a run or of a file, with the base that the run or `model` names.

    A run gives its best adapter, or its latest one if nothing was evaluated. RUN@3 is the adapter
    of version 3.
    """
    if model is not None:
        find_model(model)
    path = Path(path).expanduser()
    if not path.exists():
        path = find_adapter(path)
    directory = run_of_adapter(path)
    if directory is None:
        if model is None:
            raise ConfigError(
                f"{path} belongs to no run, so the base model of the adapter is not known. Name "
                "the model: --model NAME"
            )
        return Source(adapter=path, model=model)
    adapter = directory.chosen_adapter() if path.absolute() == directory.path else path
    settings = directory.read_settings().get("model", {})
    named = settings.get("name", "tiny")
    if model is None and not isinstance(named, str):
        raise ConfigError(
            f"{directory.config} names the model {named!r}; expected a text. Name the model: "
            "--model NAME"
        )
    return Source(
        adapter=adapter,
        model=model or named,
        dtype=DTYPES.get(str(settings.get("dtype"))),
        directory=directory,
    )


def _without_quantization(adapter: Adapter) -> Adapter:
    """Return the adapter for a float base, which is not the base that it names."""
    rules = {
        path: replace(rule, weight_qtype=None, tile_size=None)
        for path, rule in adapter.rules_by_module().items()
    }
    return replace(adapter, config=config_for_modules(rules), fingerprint=None, quantization=None)

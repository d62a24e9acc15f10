"""Fills in the settings that the size of the model decides, where the user has set none."""

from math import prod
from typing import Any

import mlx.nn as nn

from textpolicy.adapters.module_tree import named_arrays
from textpolicy.config import TrainConfig, changed, settings_of
from textpolicy.config.model_defaults import ModelSize, defaults_of
from textpolicy.config.settings import ByModel
from textpolicy.config.train import ModelOptions
from textpolicy.generation.model_files import find_model, read_architecture_file
from textpolicy.planning.unloaded_model import build_unloaded_model

# Published rates for LoRA go down to about a tenth of the default (`textpolicy.config`).
_LOW_SHARE = 0.1
_ADAPTER_KEYS = ("adapter.rank", "adapter.scale")


def with_model_defaults(config: TrainConfig) -> TrainConfig:
    """Return the config with a number for each setting that was not set and depends on the model.

    The config of a tiny model stays as it is. Values that are set already stay.
    """
    if config.model.name == "tiny":
        return config
    adapter, steps = config.adapter, config.run.steps
    given: dict[str, int] = {} if _is_free(steps) else {"steps": steps}
    given |= {"rank": adapter.rank} if adapter.rank else {}
    chosen = defaults_of(size_of(config.model), algorithm=config.algorithm.name, **given)
    values = {one.key: one.default for one in settings_of(config)}
    free = {key: new for key, new in chosen.items() if _is_free(values[key])}
    if adapter.start or adapter.config:
        free = {key: value for key, value in free.items() if key not in _ADAPTER_KEYS}
    if adapter.alpha:
        free.pop("adapter.scale", None)
    return changed(config, free)


def default_rate_of(options: ModelOptions) -> float:
    """Return the learning rate of a run with this model that sets none."""
    defaults = {} if options.name == "tiny" else defaults_of(size_of(options))
    return float(defaults.get("trainer.lr", TrainConfig().trainer.lr))


def size_of(options: ModelOptions) -> ModelSize:
    """Return the size of a model by its config.json. Weights count as before quantization."""
    architecture = read_architecture_file(find_model(options.name))
    plain = {name: value for name, value in architecture.items() if name != "quantization"}
    model = build_unloaded_model(plain)
    arrays = {id(one): prod(one.shape) for one in named_arrays(model.parameters()).values()}
    embeddings = [one for one in model.modules() if isinstance(one, nn.Embedding)]
    width = max(embeddings, key=lambda one: one.weight.shape[0]).weight.shape[1]
    return ModelSize(width=width, weights=sum(arrays.values()))


def low_rate_note(config: TrainConfig) -> str | None:
    """Return a sentence about a learning rate far below the model's default, or None."""
    rate, usual = config.trainer.lr, default_rate_of(config.model)
    if not 0 < rate < _LOW_SHARE * usual:
        return None
    return (
        f"the learning rate is {rate:g}, {usual / rate:.0f} times below the default of {usual:g} "
        "for this model, so the reward may hardly change. Such rates are usual where all weights "
        "are trained, and adapters need higher ones. Leave out --lr to get the default"
    )


def _is_free(value: Any) -> bool:
    return value is None or isinstance(value, ByModel)

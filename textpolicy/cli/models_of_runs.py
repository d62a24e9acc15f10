"""The config of a command that samples with an adapter, which may be that of a run."""

from argparse import Namespace
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from textpolicy.cli.flags import configured
from textpolicy.cli.output import print_note
from textpolicy.config import TrainConfig, changed, read_toml
from textpolicy.config.train import AdapterOptions
from textpolicy.runs import find_adapter
from textpolicy.runs.named_adapter import run_of_adapter

_KEYS = ("name", "dtype", "allow_special_tokens")
_QUANTIZATION = ("model.quantize", "model.quantize_mode", "model.quantize_group")


def configured_to_sample(options: Namespace) -> TrainConfig:
    """Return the config of `options`, with the file of the adapter that --adapter names.

    --adapter may name a run, and brings its own config in place of the file's. Without --model and
    --config, the model is that of the adapter's run.
    """
    given = vars(options)
    if given.get("config") is None or "adapter.start" not in given:
        config = configured(TrainConfig(), options)
    else:
        config = replace(read_toml(given["config"], TrainConfig()), adapter=AdapterOptions())
        config = configured(config, Namespace(**given | {"config": None}))
    if config.adapter.start is None:
        return config
    start = find_adapter(config.adapter.start)
    # The adapter says how its base is quantized.
    config = changed(config, {"adapter.start": start, **dict.fromkeys(_QUANTIZATION)})
    return with_model_of_run(config, options, [start])


def with_model_of_run(
    config: TrainConfig, options: Namespace, adapters: Iterable[Path]
) -> TrainConfig:
    """Return the config with the model of the first adapter's run, unless `options` name one."""
    given = vars(options)
    if "model.name" in given or given.get("config") is not None:
        return config
    for path in adapters:
        if run := run_of_adapter(path):
            section = run.read_settings().get("model", {})
            found = {f"model.{key}": section[key] for key in _KEYS if key in section}
            if found.get("model.name", config.model.name) != config.model.name:
                print_note(f"model {found['model.name']}, as in {run.path}")
            return changed(config, {key: found[key] for key in found if key not in given})
    return config

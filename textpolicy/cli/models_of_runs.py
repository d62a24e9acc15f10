"""The model of a command that names an adapter of a run and no model."""

from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path

from textpolicy.cli.output import print_note
from textpolicy.config import TrainConfig, changed
from textpolicy.runs.named_adapter import run_of_adapter

_KEYS = ("name", "dtype", "allow_special_tokens")


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

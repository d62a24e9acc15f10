"""`textpolicy plan`: what an adapter config would do to a model. No weight is read."""

import json
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

from textpolicy.adapters.config import AdapterConfig
from textpolicy.adapters.plan import plan
from textpolicy.adapters.skeleton import skeleton
from textpolicy.cli.report import Report
from textpolicy.errors import ConfigError
from textpolicy.generation.models import find_model


def run(options: Namespace) -> Report:
    architecture = json.loads((find_model(options.model) / "config.json").read_text("utf-8"))
    planned = plan(skeleton(architecture), adapter_config(options))
    data = {
        "modules": [asdict(row) for row in planned.modules],
        "base_bytes": planned.base_bytes,
        "adapter_bytes": planned.adapter_bytes,
        "trainable_parameters": planned.trainable_parameters,
    }
    return Report(data=data, text=str(planned))


def adapter_config(options: Namespace) -> AdapterConfig:
    """From a file, or from the words given; never from both."""
    words = {
        "num_layers": options.num_layers,
        "keys": options.keys.split(",") if options.keys else None,
        "kind": options.kind,
        "rank": options.rank,
        "scale": options.scale,
    }
    given: dict[str, Any] = {name: value for name, value in words.items() if value is not None}
    if options.adapter_config is None:
        return AdapterConfig(**given)
    if given:
        raise ConfigError(f"--adapter-config is given beside {list(given)}; put them in the file")
    return read_config(options.adapter_config)


def read_config(path: Path) -> AdapterConfig:
    """The config in a JSON file, in any form that `AdapterConfig.from_dict` knows."""
    try:
        data = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds a {type(data).__name__}; expected a JSON object")
    return AdapterConfig.from_dict(data)

"""Absolute paths in a config: a reward may change the working directory."""

from pathlib import Path
from typing import Any, TypeVar

from textpolicy.config import changed, settings_of
from textpolicy.environments.agent import AGENT_SCHEME
from textpolicy.environments.data_address import DataAddress
from textpolicy.environments.preamble import system_file
from textpolicy.experiment.assembly import RunConfig
from textpolicy.runs import find_adapter
from textpolicy.user_code import split_file_and_name

_C = TypeVar("_C", bound=RunConfig)
_NAMES_OF_FILES = {
    *("task.env", "task.reward", "evaluation.envs"),
    *("model.name", "algorithm.name", "algorithm.reference"),
    *("adapter.start", "adapter.config", "run.output"),
}
_ADDRESSES = {"task.data", "task.eval_data", "data.source", "data.eval_data"}
_SYSTEM = {"task.system", "data.system"}
_WORDS = {"tiny", "base"}


def with_found_adapter(config: _C) -> _C:
    """Return the config with the adapter file that stands for a run, where a run is named."""
    start = config.adapter.start
    return changed(config, {"adapter.start": find_adapter(start)}) if start else config


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """Return the config with an absolute path for each file and folder that exists now.

    If it names a run to start from, the config names the adapter of that run.
    """
    config = with_found_adapter(config)
    given = {one.key: one.default for one in settings_of(config) if one.key in _NAMES_OF_FILES}
    made = {key: _absolute(value) for key, value in given.items() if value is not None}
    for one in settings_of(config):
        if one.key in _ADDRESSES and one.default is not None:
            given[one.key], made[one.key] = one.default, DataAddress.parse(one.default).absolute()
        if one.key in _SYSTEM and (path := system_file(one.default)):
            given[one.key], made[one.key] = one.default, str(path.absolute())
    return changed(config, {key: value for key, value in made.items() if value != given[key]})


def _absolute(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_absolute, value))
    if isinstance(value, Path):
        return value.expanduser().absolute()
    if value in _WORDS:
        return value
    if value.startswith(AGENT_SCHEME):
        return AGENT_SCHEME + _absolute(value.removeprefix(AGENT_SCHEME))
    path, name = split_file_and_name(value) or (Path(value), "")
    path = path.expanduser()
    if not path.exists():
        return value
    return f"{path.absolute()}:{name}" if name else str(path.absolute())

"""How a run asked its model: prompts, system message, arguments of the chat template.

All of it comes from the folder of a run, which may be from elsewhere.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from mlx_lm.tokenizer_utils import TokenizerWrapper

from textpolicy.config.train import ModelOptions
from textpolicy.environments.preamble import read_system, system_file
from textpolicy.errors import ConfigError, UnreadableError
from textpolicy.experiment.assembly import template_arguments_of
from textpolicy.runs import RunDirectory
from textpolicy.types import Message, Prompt
from textpolicy.untrusted.bounds import MAX_DATA_LINE_BYTES
from textpolicy.untrusted.files import open_regular
from textpolicy.untrusted.parsing import parse_json

_PROMPTS = ("Hello", "12+30=", "Write one sentence about the sea.", "List three colours.")
"""Prompts for the proof of an adapter whose run is unknown."""
_MAX_ROWS = 10_000
"""Rows of samples that are read to find different prompts."""
_ROLES = {"system", "user", "assistant", "tool"}


@dataclass(frozen=True, kw_only=True)
class Asking:
    """What stands around the tasks of a run. `notes` say what other programs have to repeat."""

    prompts: Sequence[Prompt] = _PROMPTS
    system: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_asking(directory: RunDirectory | None, tokenizer: TokenizerWrapper, count: int) -> Asking:
    """Return how a run asked, with up to `count` different prompts, or a default without a run."""
    if directory is None:
        return Asking(prompts=_PROMPTS[:count])
    system, notes = _read_system(directory)
    arguments = _template_arguments(directory, tokenizer)
    if arguments:
        notes.append(
            f"The run gave the chat template the arguments {json.dumps(arguments)}. Other programs "
            "have to pass them too: most call them chat_template_kwargs."
        )
    prompts = _different_prompts(directory, count)
    if system and tokenizer.has_chat_template:
        prompts = [_with_system(system, prompt) for prompt in prompts]
    return Asking(
        prompts=prompts,
        system=system or _common_system(directory),
        arguments=arguments,
        notes=tuple(notes),
    )


def _read_system(directory: RunDirectory) -> tuple[str | None, list[str]]:
    """Return the system message that the config names, and a note if it is in a file."""
    settings = directory.read_settings()
    named = (settings.get("task") or settings.get("data") or {}).get("system")
    if not isinstance(named, str):
        return None, []
    path = system_file(named)
    notes = [f"The system message is the content of {path.name}."] if path else []
    try:
        return read_system(named), notes
    except ConfigError:
        return None, ["The file of the run's system message cannot be read, so it is left out."]


def _template_arguments(directory: RunDirectory, tokenizer: TokenizerWrapper) -> dict[str, Any]:
    names = ("thinking", "chat_template_kwargs")
    settings = directory.read_settings().get("model", {})
    given = {name: settings[name] for name in names if name in settings}
    return template_arguments_of(ModelOptions(**given), tokenizer) if given else {}


def _with_system(system: str, prompt: Prompt) -> Prompt:
    turns: Sequence[Message] = (
        [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    )
    if turns[0]["role"] == "system":
        return turns
    return [{"role": "system", "content": system}, *turns]


def _different_prompts(directory: RunDirectory, count: int) -> Sequence[Prompt]:
    found: dict[str, Prompt] = {}
    for prompt in _sampled_prompts(directory):
        found.setdefault(json.dumps(prompt), prompt)
        if len(found) == count:
            break
    return list(found.values()) or _PROMPTS[:count]


def _common_system(directory: RunDirectory) -> str | None:
    """Return the system message that all sampled prompts begin with, or None."""
    firsts = {
        "" if isinstance(prompt, str) or prompt[0]["role"] != "system" else prompt[0]["content"]
        for prompt in _sampled_prompts(directory)
    }
    return firsts.pop() or None if len(firsts) == 1 else None


def _sampled_prompts(directory: RunDirectory) -> Iterator[Prompt]:
    """Yield the prompts of the samples, or those of the held-out rows of supervised training."""
    for path in (directory.samples, directory.validation_rows):
        if path.exists():
            prompts = (row.get("prompt") for row in _rows(path))
            yield from filter(_is_prompt, prompts)


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the first rows of a file, without lines that are too long or no rows."""
    try:
        with open_regular(path) as file:
            for _ in range(_MAX_ROWS):
                line = file.readline(MAX_DATA_LINE_BYTES)
                if not line:
                    return
                try:
                    row = parse_json(line)
                except ValueError:
                    continue
                if isinstance(row, dict):
                    yield row
    except UnreadableError:
        return


def _is_prompt(value: Any) -> TypeGuard[Prompt]:
    """Return whether a value is a text, or messages with known roles and texts."""
    if isinstance(value, str):
        return bool(value)
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(message, dict)
            and message.get("role") in _ROLES
            and isinstance(message.get("content"), str)
            for message in value
        )
    )

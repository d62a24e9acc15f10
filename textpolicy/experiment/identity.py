"""What a run's numbers depend on beside its options: the files of its model, code and rows."""

import ast
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path

from textpolicy.adapters.config.adapter_config import AdapterConfig
from textpolicy.adapters.container import AdapterContainer
from textpolicy.config import SFTConfig
from textpolicy.config.train import AdapterOptions, TaskOptions
from textpolicy.environments.agent import AGENT_SCHEME
from textpolicy.environments.data_address import DataAddress
from textpolicy.environments.load import ready_names
from textpolicy.environments.preamble import system_file
from textpolicy.errors import UnreadableError, UnwritableError
from textpolicy.experiment.assembly import RunConfig, adapter_config
from textpolicy.file_writing import atomic_replace, make_private_folder
from textpolicy.generation.model_files import find_model
from textpolicy.untrusted.parsing import read_json_file
from textpolicy.user_code import split_file_and_name

Hashes = dict[str, str]

_MODEL_FILES = {".json", ".safetensors", ".txt", ".jinja", ".model", ".tiktoken"}
# Smaller files are read in less than a tenth of a second.
_CACHED_FROM = 64 << 20


def identity_of(config: RunConfig) -> Hashes:
    """Return the hash of each file that the run's numbers depend on, by a name for people."""
    found = _model_files("model", config.model.name)
    found["adapter: its config"] = _hash_of_config(_config_of(config.adapter))
    found |= _system_file(
        config.data.system if isinstance(config, SFTConfig) else config.task.system
    )
    if isinstance(config, SFTConfig):
        return found
    found |= _task_files(config.task)
    for name in config.evaluation.envs or ():
        found |= _code("evaluation", _environment_file(name))
    found |= _code("algorithm", _file_in(config.algorithm.name))
    if config.algorithm.reference not in (None, "base"):
        found |= _model_files("reference", config.algorithm.reference)
    return found


def changes_of(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return in words which files differ between two identities."""
    changed = [f"{name} has changed" for name in now if name in then and then[name] != now[name]]
    changed += [f"{name} is new" for name in now.keys() - then.keys()]
    changed += [f"{name} is gone" for name in then.keys() - now.keys()]
    return sorted(changed)


def hash_of(path: Path) -> str:
    """Return the SHA-256 of a file. A large file is read again only if it may have changed."""
    status = path.stat()
    if status.st_size < _CACHED_FROM:
        return _read_hash(path)
    name = str(path.resolve())
    # A write changes the times even if the size stays the same.
    state = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    known = _read_cache()
    if (entry := known.get(name)) and entry[:-1] == state:
        return str(entry[-1])
    found = _read_hash(path)
    _write_cache(known | {name: [*state, found]})
    return found


def _read_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cache_file() -> Path:
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "textpolicy" / "hashes.json"


def _read_cache() -> dict[str, list[int | str]]:
    try:
        content = read_json_file(_cache_file())
    except UnreadableError:
        return {}
    entries = content.items() if isinstance(content, dict) else ()
    return {name: entry for name, entry in entries if isinstance(entry, list) and len(entry) == 5}


def _write_cache(entries: Mapping[str, Sequence[int | str]]) -> None:
    try:
        make_private_folder(_cache_file().parent)
        with atomic_replace(_cache_file(), private=True) as temporary:
            temporary.write_text(json.dumps(entries), "utf-8")
    except (OSError, UnwritableError):
        # Without the cache the next start reads the file again.
        return


def _model_files(word: str, name: str) -> Hashes:
    folder = find_model(name)
    files = sorted(path for path in folder.iterdir() if path.suffix in _MODEL_FILES)
    return {f"{word}: {path.name}": hash_of(path) for path in files if path.is_file()}


def _config_of(options: AdapterOptions) -> AdapterConfig:
    if options.start:
        return AdapterContainer.from_directory(options.start).config
    return adapter_config(options)


def _hash_of_config(config: AdapterConfig) -> str:
    return hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode()).hexdigest()


def _task_files(task: TaskOptions) -> Hashes:
    found = _code("environment", _environment_file(task.env)) if task.env else {}
    found |= _code("reward", _file_in(task.reward or ""))
    return found | _row_files("rows", task.data) | _row_files("held-out rows", task.eval_data)


def _row_files(word: str, address: str | None) -> Hashes:
    if address is None:
        return {}
    rows = Path(DataAddress.parse(address).place)
    if rows.is_file():
        return {f"{word}: {rows.name}": hash_of(rows)}
    files = sorted(path for path in rows.rglob("*") if path.is_file()) if rows.is_dir() else []
    return {f"{word}: {path.relative_to(rows)}": hash_of(path) for path in files}


def _system_file(text_or_file: str | None) -> Hashes:
    path = system_file(text_or_file)
    return {f"system message: {path.name}": hash_of(path)} if path and path.is_file() else {}


def _environment_file(spec: str) -> Path | None:
    """Return the Python file of an environment, or None for the environment of a library."""
    if spec in ready_names():
        return Path(import_module(f"textpolicy_envs.{spec}").__file__ or "")
    return _file_in(spec.removeprefix(AGENT_SCHEME))


def _file_in(spec: str) -> Path | None:
    named = split_file_and_name(spec)
    return named[0] if named else None


def _code(word: str, file: Path | None) -> Hashes:
    """Return the hashes of a Python file, and of the files beside it that it imports."""
    if file is None:
        return {}
    return {
        f"{word}: {path.relative_to(file.parent)}": _read_hash(path) for path in _imported(file)
    }


def _imported(file: Path) -> Iterator[Path]:
    found: set[Path] = set()
    waiting = [file]
    while waiting:
        path = waiting.pop()
        if path in found or not path.is_file():
            continue
        found.add(path)
        yield path
        for name in _imported_names(path):
            module = file.parent.joinpath(*name.split("."))
            waiting += [module.with_suffix(".py"), module / "__init__.py"]


def _imported_names(path: Path) -> Iterator[str]:
    """Yield the names of modules that a file imports by an absolute name."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from (
            ".".join(parts[:size])
            for parts in (name.split(".") for name in names if "*" not in name)
            for size in range(1, len(parts) + 1)
        )

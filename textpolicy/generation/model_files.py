"""Finding the folder of a model: the embedded tiny model, a local folder, or a hub snapshot."""

import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from textpolicy.errors import ModelError, UnreadableError
from textpolicy.untrusted.bounds import MAX_LAYERS, MAX_SIZE, MAX_VOCABULARY_BYTES
from textpolicy.untrusted.files import open_regular
from textpolicy.untrusted.parsing import read_json_object

# Weights only as safetensors: files of other formats can carry code.
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model", "*.tiktoken"]
_CONFIG = "config.json"
_SMALL_FILES = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
# The numbers of a config that count parts which are built one by one.
_COUNTED = re.compile(r"layer|block|expert|depth")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tiktoken.model")


def tiny_model() -> Path:
    """Return the folder of the embedded model, a complete Qwen3 checkpoint of about a megabyte."""
    return Path(__file__).parent.parent / "tiny"


def find_model(name: str | Path) -> Path:
    """Return the folder of a model: "tiny", a local folder, or a hub repository's snapshot."""
    if name == "tiny":
        return _checked(tiny_model())
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _checked(folder)
    if str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
        raise ModelError(
            f"there is no model at {str(name)!r}; expected 'tiny', a folder with config.json and "
            "*.safetensors, or a hub id such as 'Qwen/Qwen3-0.6B'"
        )
    return _checked(_download_snapshot(str(name)))


def read_architecture_file(folder: Path) -> dict[str, Any]:
    """Return the content of a model's config.json."""
    if not (folder / _CONFIG).exists():
        raise ModelError(
            f"the folder {folder} is not a model, because it has no {_CONFIG}; name the folder "
            f"that holds {_CONFIG} and the weights"
        )
    try:
        # Some models give a time limit of Infinity.
        return read_json_object(folder / _CONFIG, constants=True)
    except UnreadableError as error:
        raise ModelError(f"{error}; download the model again") from error


def _download_snapshot(repository: str) -> Path:
    try:
        return Path(snapshot_download(repository, allow_patterns=_HUB_FILES))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise ModelError(
            f"the model {repository!r} is not a folder on this machine, is not in the cache "
            f"({constants.HF_HUB_CACHE}), and could not be downloaded: {error}\n"
            f"On a machine with network run `hf download {repository}`, or pass a folder, "
            "or use the embedded model: 'tiny'"
        ) from error


def _checked(folder: Path) -> Path:
    """Return the folder. Raise `ModelError` if it is no model or asks to run code."""
    architecture = read_architecture_file(folder)
    _check_numbers(folder, architecture)
    _check_files(folder)
    if "model_file" in architecture:
        raise ModelError(
            f"{folder / _CONFIG} asks to run Python code (model_file); such models are refused"
        )
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise ModelError(f"{folder} has no tokenizer; expected one of {list(_TOKENIZER_FILES)}")
    return folder


def _check_numbers(folder: Path, value: Any, name: str = "") -> None:
    """Raise `ModelError` for a number that no model has: building its layers would never end."""
    if isinstance(value, dict):
        for key, part in value.items():
            _check_numbers(folder, part, str(key))
    elif isinstance(value, list):
        for part in value:
            _check_numbers(folder, part, name)
    elif isinstance(value, int):
        limit = MAX_LAYERS if _COUNTED.search(name) else MAX_SIZE
        if abs(value) > limit:
            raise ModelError(
                f"{folder / _CONFIG} has {name} {value:.3g}; expected at most {limit:,}. Download "
                "the model again"
            )


def _check_files(folder: Path) -> None:
    """Raise `ModelError` for files that cannot be read, or that no model has.

    The libraries that load a model would wait for a pipe, and read a device without end.
    """
    try:
        for name in _SMALL_FILES:
            if os.path.lexists(folder / name):
                read_json_object(folder / name, constants=True)
        for path in (path for pattern in _HUB_FILES for path in folder.glob(pattern)):
            with open_regular(path) as file:
                size = os.fstat(file.fileno()).st_size
            if path.suffix != ".safetensors" and size > MAX_VOCABULARY_BYTES:
                raise UnreadableError(f"{path} has {size:,} bytes, too many for such a file")
            if path.suffix == ".safetensors":
                # Its reader refuses overlapping tensors, which that of mlx accepts.
                with safe_open(path, "np"):
                    pass
    except (UnreadableError, SafetensorError) as error:
        raise ModelError(
            f"the model in {folder} cannot be loaded: {error}. Download the model again"
        ) from error

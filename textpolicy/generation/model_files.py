"""Where a model's files are: the embedded tiny model, a folder, or a snapshot from the hub."""

import json
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from textpolicy.errors import ModelError

TINY = "tiny"
# Weights as safetensors only: the other formats can carry code or overrun their reader.
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model", "*.tiktoken"]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tiktoken.model")


def tiny_model() -> Path:
    """The folder of the model inside this package: a whole Qwen3 checkpoint of about a megabyte."""
    return Path(__file__).parent.parent / "tiny"


def find_model(name: str | Path) -> Path:
    """The folder of `name`: "tiny", a local folder, or a hub repository's snapshot."""
    if name == TINY:
        return _checked(tiny_model())
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _checked(folder)
    if str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
        raise ModelError(
            f"no model at {str(name)!r}: expected 'tiny', a folder with config.json and "
            "*.safetensors, or a hub id such as 'Qwen/Qwen3-0.6B'"
        )
    return _checked(_snapshot(str(name)))


def _snapshot(repository: str) -> Path:
    try:
        return Path(snapshot_download(repository, allow_patterns=_HUB_FILES))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise ModelError(
            f"model {repository!r} is neither a folder here nor in the cache "
            f"({constants.HF_HUB_CACHE}), and the hub did not give it: {error}\n"
            f"On a machine with network run `hf download {repository}`, or pass a folder, "
            "or use the embedded model: 'tiny'"
        ) from error


def _checked(folder: Path) -> Path:
    config = folder / "config.json"
    if not config.is_file():
        raise ModelError(f"{folder} is not a model: it has no config.json")
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{config} is not JSON ({error}): was its download cut off?") from error
    if not isinstance(content, dict):
        raise ModelError(f"{config} holds a {type(content).__name__}; expected a JSON object")
    if "model_file" in content:
        raise ModelError(f"{config} asks to run Python code (model_file); such models are refused")
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise ModelError(f"{folder} has no tokenizer: expected one of {list(_TOKENIZER_FILES)}")
    return folder

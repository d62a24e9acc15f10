"""Finding the folder of a model: the embedded tiny model, a local folder, or a hub snapshot."""

from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from textpolicy.errors import ModelError, UnreadableError
from textpolicy.untrusted.parsing import read_json_object

# Weights only as safetensors: files of other formats can carry code.
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model", "*.tiktoken"]
_CONFIG = "config.json"
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
    if "model_file" in read_architecture_file(folder):
        raise ModelError(
            f"{folder / _CONFIG} asks to run Python code (model_file); such models are refused"
        )
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise ModelError(f"{folder} has no tokenizer; expected one of {list(_TOKENIZER_FILES)}")
    return folder

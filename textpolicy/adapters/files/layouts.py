"""Adapters as folders and as files, told apart by what is in them."""

from dataclasses import replace
from pathlib import Path

import mlx.nn as nn

from textpolicy.adapters.adapter import Adapter
from textpolicy.adapters.files import mlx_folder, peft_folder
from textpolicy.adapters.files.adapter_file import read_adapter_file
from textpolicy.adapters.files.tensor_file import make_writable_folder
from textpolicy.errors import AdapterError, ConfigError

# Names of adapters that a run keeps.
_RUN = ("best", "latest")
_WRITERS = {"mlx": mlx_folder.write_mlx_folder, "peft": peft_folder.write_peft_folder}


def read_adapter(path: str | Path) -> Adapter:
    """The adapter in one file of this library, or in a folder of mlx-lm, mlx-swift-lm or PEFT.

    It is evaluated: what is written there later does not change it.
    """
    path = Path(path).expanduser()
    return _read_folder(path) if path.is_dir() else read_adapter_file(path)


def write_folder(
    folder: str | Path,
    adapter: Adapter,
    model: nn.Module,
    layout: str,
    *,
    over_float_base: bool = False,
) -> Path:
    """Write an adapter of `model`, which has to be bare, as another library reads it.

    Each file is replaced in one step, but the two of them are not: what is read while it is
    written belongs into one file.
    """
    if layout not in _WRITERS:
        raise ConfigError(f"layout is {layout!r}; expected one of {list(_WRITERS)}")
    folder = Path(folder).expanduser().absolute()
    make_writable_folder(folder, folder)
    if over_float_base:
        # It is not the base that they were made for, and the file must not say so.
        adapter = replace(adapter, fingerprint=None, quantization=None)
    _WRITERS[layout](folder, adapter, model, over_float_base=over_float_base)
    return folder


def _read_folder(path: Path) -> Adapter:
    found = {name for name in _READERS if (path / name).exists()}
    if len(found) != 1:
        raise AdapterError(
            f"{path} is a folder with {sorted(found) or 'no adapters'} in it; expected one of "
            f"{list(_READERS)}{_advice(path)}"
        )
    return _READERS[found.pop()](path)


def _advice(path: Path) -> str:
    if (path / "adapter_model.bin").exists():
        return (
            ". adapter_model.bin can run code when it is opened, and is not read: load it in PEFT "
            "and save it with safe_serialization=True"
        )
    # A run, or its folder of adapters.
    places = [place / f"{name}.safetensors" for place in (path / "adapters", path) for name in _RUN]
    if found := [str(place) for place in places if place.is_file()]:
        return f". For the adapters of a run name their file: {' or '.join(found)}"
    return ""


_READERS = {
    mlx_folder.MLX_TENSOR_FILE: mlx_folder.read_mlx_folder,
    peft_folder.PEFT_TENSOR_FILE: peft_folder.read_peft_folder,
}

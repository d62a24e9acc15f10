"""Reading an adapter from a file or folder of any known layout, and writing a folder."""

from dataclasses import replace
from pathlib import Path

import mlx.nn as nn

from textpolicy.adapters.adapter import Adapter
from textpolicy.adapters.files import mlx_folder, peft_folder
from textpolicy.adapters.files.adapter_file import read_adapter_file
from textpolicy.adapters.files.gguf_lora import read_gguf_lora
from textpolicy.errors import AdapterError, ConfigError
from textpolicy.file_writing import make_writable_folder

# The names of the adapter files that a run keeps.
_RUN_FILES = ("best.safetensors", "latest.safetensors")
_WRITERS = {"mlx": mlx_folder.write_mlx_folder, "peft": peft_folder.write_peft_folder}
_READERS = {
    mlx_folder.MLX_TENSOR_FILE: mlx_folder.read_mlx_folder,
    peft_folder.PEFT_TENSOR_FILE: peft_folder.read_peft_folder,
}


def read_adapter(path: str | Path) -> Adapter:
    """Return the adapter in a file of this library, a GGUF file, or a folder of another library.

    Folders of mlx-lm, mlx-swift-lm and PEFT are read, and GGUF files with LoRA.

    The adapter is evaluated, so that replacing the file later has no effect.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        return read_gguf_lora(path) if path.suffix == ".gguf" else read_adapter_file(path)
    found = {name for name in _READERS if (path / name).exists()}
    if len(found) != 1:
        raise AdapterError(
            f"{path} is a folder with {sorted(found) or 'no adapters'} in it; expected one of "
            f"{list(_READERS)}{_advice(path)}"
        )
    return _READERS[found.pop()](path)


def write_folder(
    folder: str | Path, adapter: Adapter, model: nn.Module, layout: str, *, over_float_base: bool
) -> Path:
    """Write an adapter of `model`, which must be without adapters, in another library's layout.

    Returns the folder. Each of its two files is replaced in one step, but not both together. If
    another process reads while this process writes, use one adapter file instead.
    """
    if layout not in _WRITERS:
        raise ConfigError(f"layout is {layout!r}; expected one of {list(_WRITERS)}")
    folder = Path(folder).expanduser().absolute()
    make_writable_folder(folder, folder)
    if over_float_base:
        # The float base is not the base of the training, so the file must not name that one.
        adapter = replace(adapter, fingerprint=None, quantization=None)
    _WRITERS[layout](folder, adapter, model, over_float_base=over_float_base)
    return folder


def _advice(path: Path) -> str:
    if (path / "adapter_model.bin").exists():
        return (
            ". adapter_model.bin is not read, because opening it can run code. Load it in PEFT and "
            "save it with safe_serialization=True"
        )
    # The path may be a run's directory, or the folder of its adapters.
    places = [folder / name for folder in (path / "adapters", path) for name in _RUN_FILES]
    if files := [str(place) for place in places if place.is_file()]:
        return f". This is a run. To load its adapters, pass one of the files: {' or '.join(files)}"
    return ""

"""Writing a GGUF file again with something changed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from textpolicy.adapters.files.gguf_file import parse_gguf
from textpolicy.adapters.files.gguf_lora import METADATA_PREFIX
from textpolicy.export.gguf.gguf_package import tensor_in_memory, write_gguf_file

Change = Callable[[str, mx.array], mx.array]


def rewrite(
    source: Path,
    target: Path,
    *,
    tensor: Change = lambda _, array: array,
    number_format: str = "f32",
    drop: tuple[str, ...] = (),
    **metadata: Any,
) -> Path:
    """Write `source` to `target` with other metadata, and tensors changed by a function.

    Keys that start with one of `drop` are left out, and so are the keys of this library: the
    result is a file as another program writes it.
    """
    content = parse_gguf(memoryview(source.read_bytes()))
    left_out = (METADATA_PREFIX, "general.architecture", *drop)
    kept = {k: v for k, v in content.metadata.items() if not k.startswith(left_out)}
    architecture = metadata.pop("architecture", content.metadata["general.architecture"])
    tensors = {
        name: tensor_in_memory(tensor(name, one.read()), number_format)
        for name, one in content.tensors.items()
    }
    return write_gguf_file(target, architecture, kept | metadata, tensors)

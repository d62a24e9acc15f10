"""What a model card says about each format: the library that loads it, its tags, its kind."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from textpolicy.export.gguf_folders import ADAPTER_FILE


@dataclass(frozen=True, kw_only=True)
class FormatFacts:
    """What a card says about a format: `loaded_by` is the hub's name of the library that loads it.

    `continued_by` is the flag by which training continues from such a folder, or None. It takes
    the folder, or the `file` in it.
    """

    loaded_by: str
    tags: Sequence[str]
    is_adapter: bool
    continued_by: str | None
    file: str = ""


_MERGED = FormatFacts(loaded_by="mlx", tags=("mlx",), is_adapter=False, continued_by="--model")
_PEFT = FormatFacts(
    loaded_by="peft", tags=("peft", "lora"), is_adapter=True, continued_by="--adapter"
)
_GGUF = FormatFacts(loaded_by="gguf", tags=("gguf",), is_adapter=False, continued_by=None)
FORMAT_FACTS: Mapping[str, FormatFacts] = {
    "mlx": _MERGED,
    "lmstudio": _MERGED,
    "hf": FormatFacts(
        loaded_by="transformers", tags=("safetensors",), is_adapter=False, continued_by="--model"
    ),
    "peft": _PEFT,
    "vllm": _PEFT,
    "mlx-lm": FormatFacts(
        loaded_by="mlx", tags=("mlx", "lora"), is_adapter=True, continued_by="--adapter"
    ),
    "gguf": _GGUF,
    "ollama": _GGUF,
    "gguf-lora": FormatFacts(
        loaded_by="gguf",
        tags=("gguf", "lora"),
        is_adapter=True,
        continued_by="--adapter",
        file=ADAPTER_FILE,
    ),
}

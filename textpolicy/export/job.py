"""One export at work: what the user chose, what is loaded, and what the writers find out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from textpolicy.adapters.container import AdapterContainer
from textpolicy.adapters.fuse import FuseReport
from textpolicy.adapters.quantization.stored_weights import is_quantized
from textpolicy.experiment.assembly import DTYPES
from textpolicy.export.asking import Asking
from textpolicy.export.source import Source
from textpolicy.generation.lora import adapters_of
from textpolicy.types import Prompt

Base = Literal["merged", "checkpoint", "float"]
"""What a result computes over: its own weights, the checkpoint as it is, or float weights."""
WeightFormat = Literal["float32", "bfloat16", "float16", "q8_0"]
"""How merged weights are written. Only GGUF has q8_0."""
FLOATS: tuple[WeightFormat, ...] = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What the user may choose about an export. `weight_format` None is that of the checkpoint."""

    weight_format: WeightFormat | None = None
    dequantize: bool = False
    over_float_base: bool = False
    min_survival: float = 0.9
    tolerance: float | None = None


@dataclass(kw_only=True)
class Job:
    """The loaded model with its adapter, and the numbers that the writer fills in.

    A writer of merged weights takes the adapter out of the model.
    """

    source: Source
    options: ExportOptions
    model: nn.Module
    tokenizer: TokenizerWrapper
    architecture: Mapping[str, Any]
    asking: Asking
    over_float_base: bool = False
    """Whether the model has float weights in place of the quantized ones of the training."""
    prompts: Sequence[tuple[Prompt, Sequence[int]]] = ()
    survival: FuseReport | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def adapters(self) -> AdapterContainer:
        """The adapter in the model."""
        return adapters_of(self.model)

    @property
    def base_is_quantized(self) -> bool:
        """Whether the adapter was trained over a quantized base."""
        return any(is_quantized(module) for module in self.model.modules())

    @property
    def checkpoint_is_quantized(self) -> bool:
        """Whether the files of the base model are quantized."""
        return bool(self.architecture.get("quantization"))

    @property
    def weight_format(self) -> WeightFormat:
        """The number format of merged weights."""
        stored = str(self.architecture.get("dtype") or self.architecture.get("torch_dtype"))
        same: tuple[WeightFormat, ...] = tuple(known for known in FLOATS if known == stored)
        return self.options.weight_format or (*same, FLOATS[0])[0]

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype that the adapter is merged in: float32 before weights are rounded to q8_0."""
        return DTYPES.get(self.weight_format, mx.float32)

    @property
    def base_bytes(self) -> int:
        """The bytes of the weights in the checkpoint's files."""
        files = self.source.checkpoint.glob("*.safetensors")
        return sum(path.stat().st_size for path in files)

    def needs_float_base(self, base: Base) -> bool:
        """Return whether the result would compute over other weights than those of the training."""
        if base == "merged" or not self.base_is_quantized:
            return False
        return base == "float" or not self.checkpoint_is_quantized

    def release_model(self) -> None:
        """Drop the model, so that the memory need not hold what was written beside it."""
        self.model = nn.Module()

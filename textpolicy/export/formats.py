"""The formats of an export, in one table: how each is written, opened again and used."""

import json
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from textpolicy.export import adapter_folders, gguf_folders, merged, tolerances
from textpolicy.export.job import FLOATS, Base, Job, WeightFormat
from textpolicy.export.proof import Opened


@dataclass(frozen=True, kw_only=True)
class Format:
    """One format: `write` fills an empty folder, `reopen` computes by what is in the folder.

    `refuse` raises `ExportError` for what the format cannot hold, before anything is written, and
    `size` returns the bytes of the result. `tolerance` is the largest difference of
    log-probabilities that rounding explains. `use` returns the commands that run the result, with
    the path of its folder filled in.
    """

    name: str
    summary: str
    base: Base
    weight_formats: tuple[WeightFormat, ...] = ()
    refuse: Callable[[Job], None] = lambda job: None
    size: Callable[[Job], int]
    write: Callable[[Job, Path], None]
    reopen: Callable[[Job, Path], Iterator[Opened]]
    tolerance: Callable[[Job], float]
    use: Callable[[Job, Path], Sequence[str]]


def _mlx_bytes(job: Job) -> int:
    return merged.merged_bytes(job, keep_quantization=not job.options.dequantize)


_float_bytes = partial(merged.merged_bytes, keep_quantization=False)


def _use_mlx(job: Job, folder: Path) -> Sequence[str]:
    return (f"mlx_lm.generate --model {_quoted(folder)} --prompt {shlex.quote('Hello')}",)


def _use_lmstudio(job: Job, folder: Path) -> Sequence[str]:
    place = "~/.lmstudio/models/textpolicy"
    name = shlex.quote(folder.name)
    return (f"mkdir -p {place} && cp -r {_quoted(folder)} {place}/{name}", f"lms load {name}")


def _use_hf(job: Job, folder: Path) -> Sequence[str]:
    return (f"transformers chat {_quoted(folder)}", f"vllm serve {_quoted(folder)}")


def _use_peft(job: Job, folder: Path) -> Sequence[str]:
    base, adapter = json.dumps(_base(job)), json.dumps(str(folder))
    code = (
        "from transformers import AutoModelForCausalLM as Base; from peft import PeftModel; "
        f"model = PeftModel.from_pretrained(Base.from_pretrained({base}), {adapter})"
    )
    return (f"python -c {shlex.quote(code)}",)


def _use_mlx_lm(job: Job, folder: Path) -> Sequence[str]:
    base = shlex.quote(_base(job))
    return (f"mlx_lm.generate --model {base} --adapter-path {_quoted(folder)} --prompt Hello",)


def _use_vllm(job: Job, folder: Path) -> Sequence[str]:
    rank = adapter_folders.rank_of_job(job)
    most = next(allowed for allowed in adapter_folders.VLLM_RANKS if allowed >= rank)
    base, named = shlex.quote(_base(job)), shlex.quote(f"{job.source.name}={folder}")
    options = f"--enable-lora --lora-modules {named} --max-lora-rank {most}"
    return (f"vllm serve {base} {options}",)


def _use_gguf(job: Job, folder: Path) -> Sequence[str]:
    return (f"llama-cli --model {_quoted(folder / gguf_folders.MODEL_FILE)}",)


def _use_gguf_adapter(job: Job, folder: Path) -> Sequence[str]:
    lora = _quoted(folder / gguf_folders.ADAPTER_FILE)
    return (f"llama-cli --model BASE.gguf --lora {lora}",)


def _use_ollama(job: Job, folder: Path) -> Sequence[str]:
    name = re.sub(r"[^a-z0-9._-]+", "-", job.source.name.lower()).strip("-._") or "model"
    file = _quoted(folder / gguf_folders.MODELFILE)
    return (f"ollama create {name} -f {file}", f"ollama run {name}")


def _quoted(folder: Path) -> str:
    return shlex.quote(str(folder))


def _base(job: Job) -> str:
    """Return the base model for another program, which does not know the embedded model."""
    return job.source.model if job.source.is_on_hub else str(job.source.checkpoint)


_MLX = Format(
    name="mlx",
    summary="merged model for mlx-lm; a quantized base stays quantized",
    base="merged",
    weight_formats=FLOATS,
    refuse=merged.refuse_unknown_quantization,
    size=_mlx_bytes,
    write=merged.write_mlx,
    reopen=merged.reopen_with_mlx_lm,
    tolerance=tolerances.for_mlx,
    use=_use_mlx,
)

_PEFT = Format(
    name="peft",
    summary="adapter folder for PEFT and Transformers",
    base="float",
    size=adapter_folders.adapter_bytes,
    write=adapter_folders.write_peft,
    reopen=adapter_folders.reopen_peft,
    tolerance=tolerances.for_adapter,
    use=_use_peft,
)

_ALL = (
    _MLX,
    Format(
        name="hf",
        summary="merged float model for Transformers, vLLM and converters",
        base="merged",
        weight_formats=FLOATS,
        refuse=merged.refuse_experts,
        size=_float_bytes,
        write=merged.write_hf,
        reopen=merged.reopen_with_mlx_lm,
        tolerance=tolerances.for_merged,
        use=_use_hf,
    ),
    _PEFT,
    Format(
        name="mlx-lm",
        summary="adapter folder for mlx-lm and mlx-swift-lm",
        base="checkpoint",
        refuse=adapter_folders.refuse_bias_for_mlx_lm,
        size=adapter_folders.adapter_bytes,
        write=adapter_folders.write_mlx_lm,
        reopen=adapter_folders.reopen_over_checkpoint,
        tolerance=tolerances.for_adapter,
        use=_use_mlx_lm,
    ),
    Format(
        name="gguf",
        summary="merged model for llama.cpp",
        base="merged",
        weight_formats=tuple(gguf_folders.GGUF_FORMATS),
        refuse=gguf_folders.refuse_for_gguf,
        size=_float_bytes,
        write=gguf_folders.write_gguf_folder,
        reopen=gguf_folders.reopen_gguf,
        tolerance=tolerances.for_merged,
        use=_use_gguf,
    ),
    Format(
        name="gguf-lora",
        summary="adapter for llama.cpp, over a GGUF file of the base",
        base="float",
        refuse=gguf_folders.refuse_for_gguf_adapter,
        size=adapter_folders.adapter_bytes,
        write=gguf_folders.write_gguf_adapter,
        reopen=gguf_folders.reopen_gguf_adapter,
        tolerance=tolerances.for_adapter,
        use=_use_gguf_adapter,
    ),
    Format(
        name="ollama",
        summary="merged model and Modelfile for Ollama",
        base="merged",
        weight_formats=tuple(gguf_folders.GGUF_FORMATS),
        refuse=gguf_folders.refuse_for_gguf,
        size=_float_bytes,
        write=gguf_folders.write_ollama,
        reopen=gguf_folders.reopen_gguf,
        tolerance=tolerances.for_merged,
        use=_use_ollama,
    ),
    Format(
        name="vllm",
        summary="adapter folder for vLLM, with one rank and one scale",
        base="float",
        refuse=adapter_folders.refuse_for_vllm,
        size=adapter_folders.adapter_bytes,
        write=adapter_folders.write_vllm,
        reopen=adapter_folders.reopen_for_vllm,
        tolerance=tolerances.for_adapter,
        use=_use_vllm,
    ),
    Format(
        name="lmstudio",
        summary="merged model for LM Studio",
        base="merged",
        weight_formats=FLOATS,
        refuse=merged.refuse_unknown_quantization,
        size=_mlx_bytes,
        write=merged.write_mlx,
        reopen=merged.reopen_with_mlx_lm,
        tolerance=tolerances.for_mlx,
        use=_use_lmstudio,
    ),
)
FORMATS = {format.name: format for format in _ALL}

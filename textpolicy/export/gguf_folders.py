"""Folders with a GGUF file: a merged model for llama.cpp and Ollama, or an adapter."""

from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import mlx.core as mx
import numpy as np

from textpolicy.activity import doing
from textpolicy.errors import AdapterError, ExportError
from textpolicy.export.adapter_folders import open_adapter, refuse_bias
from textpolicy.export.gguf import (
    has_llama_cpp,
    read_gguf_model,
    write_gguf,
    write_gguf_lora,
)
from textpolicy.export.gguf.gguf_package import import_gguf
from textpolicy.export.gguf.llama_cpp import computed_by_llama_cpp
from textpolicy.export.gguf.model_metadata import checked_family
from textpolicy.export.gguf.token_check import CHECKED_TEXTS, require_equal_tokens
from textpolicy.export.gguf.tokenizer_metadata import tokenizer_metadata
from textpolicy.export.job import Job, WeightFormat
from textpolicy.export.merged import merge, new_biases
from textpolicy.export.modelfile import modelfile
from textpolicy.export.proof import Opened, log_probabilities_of
from textpolicy.export.q8_0 import round_to_q8_0
from textpolicy.generation.mlx_generation import load_model

MODEL_FILE, ADAPTER_FILE, MODELFILE = "model.gguf", "adapter.gguf", "Modelfile"
GGUF_FORMATS: dict[WeightFormat, str] = {
    "float32": "f32",
    "bfloat16": "bf16",
    "float16": "f16",
    "q8_0": "q8_0",
}
_BASE_FILE = "base.gguf"
# llama.cpp needs the base as GGUF to apply an adapter. A larger base is not written only for that.
_MAX_BASE_BYTES = 2_000_000_000


def refuse_for_gguf(job: Job) -> None:
    """Raise an error for a model or a tokenizer that llama.cpp would not compute as mlx-lm does."""
    import_gguf()
    family = checked_family(job.model)
    tokenizer_metadata(job.tokenizer, job.architecture["vocab_size"])
    new = [
        path
        for path in new_biases(job)
        if path.partition("layers.")[2].partition(".")[2] not in family.biases
    ]
    if new:
        raise ExportError(
            f"the adapter trains a bias for {new[0]} and {len(new) - 1} more modules, and "
            "llama.cpp has no bias there. Export the adapter for PEFT, which can hold such a "
            "bias: --to peft"
        )


def refuse_for_gguf_adapter(job: Job) -> None:
    """Raise an error for a model or a tokenizer that llama.cpp would not compute as mlx-lm does."""
    import_gguf()
    refuse_bias(job, "llama.cpp")
    checked_family(job.model)
    tokenizer_metadata(job.tokenizer, job.architecture["vocab_size"])


def write_gguf_folder(job: Job, folder: Path) -> None:
    """Write the merged model as one GGUF file."""
    merge(job, keep_quantization=False)
    with doing("writing the GGUF file"):
        write_gguf(
            folder / MODEL_FILE,
            job.model,
            job.tokenizer,
            job.architecture,
            number_format=GGUF_FORMATS[job.weight_format],
            name=job.source.name,
        )
    if job.weight_format == "q8_0":
        # What the file holds, for the proof.
        round_to_q8_0(job.model)
    # The reader of the file computes in float32, on a GPU too, and takes as much memory later.
    job.model.set_dtype(mx.float32)


def write_ollama(job: Job, folder: Path) -> None:
    """Write the merged model as one GGUF file, and a Modelfile over it."""
    write_gguf_folder(job, folder)
    text = modelfile(job.tokenizer, job.asking, job.notes)
    (folder / MODELFILE).write_text(text, "utf-8")
    job.notes.append("`ollama create` was not run by TextPolicy, whose tests have no Ollama.")


def write_gguf_adapter(job: Job, folder: Path) -> None:
    """Write the adapter as one GGUF file."""
    try:
        write_gguf_lora(
            folder / ADAPTER_FILE,
            job.adapters.adapter(),
            job.architecture,
            over_float_base=job.over_float_base,
        )
    except AdapterError as error:
        raise ExportError(f"{error}: --to gguf") from error


def reopen_gguf(job: Job, folder: Path) -> Iterator[Opened]:
    """Compute by our reader of GGUF, and by llama.cpp where it is installed."""
    path = folder / MODEL_FILE
    with doing("opening the GGUF file again"):
        compute = log_probabilities_of(read_gguf_model(path))
    yield Opened(compute=compute, by="TextPolicy's reader of GGUF files")
    yield from _by_llama_cpp(job, path)


def reopen_gguf_adapter(job: Job, folder: Path) -> Iterator[Opened]:
    """Compute by our reader of GGUF adapters, and by llama.cpp over the base as GGUF."""
    path = folder / ADAPTER_FILE
    yield open_adapter(job, path, "TextPolicy's reader of GGUF adapters")
    if not has_llama_cpp() or job.base_bytes > _MAX_BASE_BYTES:
        return
    with TemporaryDirectory(dir=folder) as temporary:
        base = Path(temporary) / _BASE_FILE
        with doing("writing the base as GGUF, for llama.cpp"):
            model, _ = load_model(job.source.model, dtype=job.source.dtype)
            write_gguf(base, model, job.tokenizer, job.architecture)
        yield from _by_llama_cpp(job, base, path)


def _by_llama_cpp(job: Job, model: Path, lora: Path | None = None) -> Iterator[Opened]:
    if not has_llama_cpp():
        return

    def compute_all(sequences: Sequence[Sequence[int]]) -> np.ndarray:
        with doing("letting llama.cpp compute the same"):
            rows, tokens = computed_by_llama_cpp(
                model, sequences, job.architecture["vocab_size"], CHECKED_TEXTS, lora=lora
            )
        # A base that was written only for the proof of an adapter is not exported.
        if lora is None:
            require_equal_tokens(job.tokenizer, tokens)
        return rows

    yield Opened(compute_ends=compute_all, by=f"llama.cpp (xllamacpp {version('xllamacpp')})")

"""Folders with the adapter alone, for mlx-lm, PEFT and vLLM, which load it over the base."""

from collections.abc import Iterator
from pathlib import Path

import mlx_lm

from textpolicy.activity import doing
from textpolicy.adapters.files.mlx_folder import (
    CONFIG_FILE,
    read_adapter_config,
    write_json_file,
)
from textpolicy.adapters.files.single_rank import with_single_rank
from textpolicy.backend import versions
from textpolicy.errors import AdapterError, ExportError
from textpolicy.export.job import Job
from textpolicy.export.merged import has_experts, in_precision_of
from textpolicy.export.proof import Opened, log_probabilities_of
from textpolicy.generation.mlx_generation import load_model

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM allows for --max-lora-rank."""


def write_mlx_lm(job: Job, folder: Path) -> None:
    """Write the adapter folder of mlx-lm and mlx-swift-lm."""
    _save(job, folder, "mlx")


def write_peft(job: Job, folder: Path) -> None:
    """Write the adapter folder of PEFT."""
    _save(job, folder, "peft")


def write_vllm(job: Job, folder: Path) -> None:
    """Write an adapter folder of PEFT with one rank and one scale, as vLLM reads it.

    Ranks and alphas of single modules are read by vLLM 0.32, and ignored by older releases.
    """
    adapters = job.adapters
    adapters.swap(with_single_rank(adapters.adapter()))
    _save(job, folder, "peft")


def refuse_bias_for_mlx_lm(job: Job) -> None:
    """Raise `ExportError` if the adapter has a bias."""
    refuse_bias(job, "mlx-lm")


def refuse_bias(job: Job, program: str) -> None:
    """Raise `ExportError` if the adapter has a bias, which this program does not load."""
    if any(name.endswith(".lora_bias") for name in job.adapters.parameters()):
        raise ExportError(
            f"{program} loads no adapter with a bias. Export the adapter for PEFT, which does: "
            "--to peft"
        )


def refuse_for_vllm(job: Job) -> None:
    """Raise `ExportError` for what vLLM does not load, or would load wrongly."""
    layers = job.adapters.layers()
    kinds = {layer.kind for layer in layers.values()}
    problems: list[str] = []
    if "dora" in kinds:
        problems.append("vLLM loads no DoRA")
    refuse_bias(job, "vLLM")
    if tables := [path for path, layer in layers.items() if layer.module_kind == "embedding"]:
        problems.append(f"{tables[0]} is an embedding table, whose adapter vLLM reads otherwise")
    if (rank := rank_of_job(job)) > VLLM_RANKS[-1]:
        problems.append(f"its rank is {rank}, and vLLM allows at most {VLLM_RANKS[-1]}")
    if problems:
        raise ExportError(
            f"vLLM cannot load this adapter: {'; '.join(problems)}. Export the merged model, which "
            f"vLLM serves without an adapter: --to {_merged_format(job)}"
        )


def rank_of_job(job: Job) -> int:
    """Return the largest rank of the adapter."""
    return max(layer.rank for layer in job.adapters.layers().values())


def reopen_peft(job: Job, folder: Path) -> Iterator[Opened]:
    """Load the base and the written adapter folder afresh."""
    yield open_adapter(job, folder, "TextPolicy's reader of PEFT folders")


def reopen_for_vllm(job: Job, folder: Path) -> Iterator[Opened]:
    """Load the base and the adapter folder, which must have one rank and one scale."""
    config = read_adapter_config(folder)
    if config["rank_pattern"] or config["alpha_pattern"]:
        raise ExportError(
            f"{folder} has ranks or alphas of single modules, which older releases of vLLM ignore"
        )
    return reopen_peft(job, folder)


def reopen_over_checkpoint(job: Job, folder: Path) -> Iterator[Opened]:
    """Load checkpoint and adapter folder as any program does that uses mlx-lm."""
    with doing("opening the export again"):
        model, *_ = mlx_lm.load(
            str(job.source.checkpoint),
            adapter_path=str(folder),
            tokenizer_config={"trust_remote_code": False},
        )
    yield Opened(compute=in_precision_of(job, model), by=f"mlx-lm {versions()['mlx-lm']}")


@doing("opening the export again")
def open_adapter(job: Job, path: Path, by: str) -> Opened:
    """Load the base and an adapter afresh, by this library's reader of its layout."""
    source = job.source
    if job.over_float_base:
        model = source.load_over_float_base(path)
    else:
        model, _ = load_model(source.model, path, dtype=source.dtype)
    return Opened(compute=log_probabilities_of(model), by=by)


def adapter_bytes(job: Job) -> int:
    """Return the bytes of the adapter's tensors."""
    return sum(array.nbytes for array in job.adapters.parameters().values())


def _save(job: Job, folder: Path, layout: str) -> None:
    try:
        job.adapters.save(folder, layout=layout, over_float_base=job.over_float_base)
    except AdapterError as error:
        raise ExportError(f"{error}. Merge it: --to {_merged_format(job)}") from error
    if layout == "peft" and job.source.is_on_hub:
        config = read_adapter_config(folder) | {"base_model_name_or_path": job.source.model}
        write_json_file(folder / CONFIG_FILE, config)


def _merged_format(job: Job) -> str:
    """Return the format of a merged model that can hold this kind of model."""
    return "mlx" if has_experts(job) else "hf"

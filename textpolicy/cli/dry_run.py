"""What a run would be and how much memory it would take, before the run is started."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from mlx_lm.utils import load_tokenizer

from textpolicy.adapters.quantization.number_formats import NumberFormat
from textpolicy.cli.answer import Answer, table
from textpolicy.cli.measured_steps import RealSteps, run_measured_steps
from textpolicy.config import TrainConfig, to_toml
from textpolicy.config.train import ModelOptions
from textpolicy.environments import Environment
from textpolicy.errors import ModelError
from textpolicy.experiment.assembly import (
    adapter_config,
    dtype_of,
    find_algorithm,
    plain_settings,
    quantization_of,
    sampling_of,
)
from textpolicy.experiment.tasks import find_task
from textpolicy.generation.model_files import find_model
from textpolicy.generation.prompts import encode_prompt
from textpolicy.planning.memory_plan import MemoryPlan, plan_memory

_TASKS = 64
"""Held-out tasks whose prompts are measured."""
_KEYS = {"sampling": "estimated_generation_bytes", "training": "estimated_training_bytes"}


def show_plan(config: TrainConfig, *, measure: bool = False) -> Answer:
    """Answer the settings of a run and an estimate of its memory. No weight is read.

    With `measure`, take two real steps, and correct the estimate by the peaks of the second step.
    """
    find_algorithm(config.algorithm)
    environment, _ = find_task(config.task)
    lengths = {
        "prompt_tokens": _prompt_tokens(config, environment),
        "completion_tokens": sampling_of(config, environment).max_tokens,
    }
    rows = [
        ("prompt", f"up to {lengths['prompt_tokens']} tokens in {_TASKS} held-out tasks"),
        ("completion", f"up to {lengths['completion_tokens']} tokens"),
    ]
    data: dict[str, Any] = {"config": plain_settings(config), **lengths}
    measured = run_measured_steps(config, steps=1) if measure else None
    try:
        planned = estimate_memory(config, **lengths)
        factors = _correction_factors(config, measured) if measured else {}
    except ModelError as error:
        rows.append(("memory", f"not known: {error}"))
    else:
        data |= {_KEYS[name]: round(n * factors.get(name, 1)) for name, n in planned.peaks.items()}
        rows += _memory_rows(planned, factors)
        if has_turns(environment) and not measured:
            rows.append(("turns", "memory is that of one turn; several are not planned"))
        if measured:
            data["correction_factors"] = factors
    if measured:
        data["measured_bytes"] = measured.peaks
        sizes = " and ".join(f"{_megabytes(n)} in {name}" for name, n in measured.peaks.items())
        seen = (
            "prompts of up to {prompt_tokens} and completions of up to {completion_tokens} tokens"
        )
        rows.append(("measured", f"{sizes}, with {seen.format(**measured.lengths)}"))
    return Answer(data=data, text=f"{to_toml(config)}\n{table(rows)}\nno run was started")


def estimate_memory(
    config: TrainConfig, *, prompt_tokens: int, completion_tokens: int
) -> MemoryPlan:
    """Return the plan of a step; raise ModelError for a model whose memory is not known."""
    rollout, trainer, reference = config.rollout, config.trainer, config.algorithm.reference
    other = None if reference in (None, "base") else ModelOptions(name=reference)
    return plan_memory(
        read_architecture(config.model),
        adapter_config(config.adapter),
        batch=rollout.groups_per_step * rollout.group_size,
        group_size=rollout.group_size,
        micro_batch_size=trainer.micro_batch_size,
        checkpoint_gradients=trainer.checkpoint_gradients,
        dtype=dtype_of(config.model),
        reference=read_architecture(other) if other else None,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
    )


def read_architecture(options: ModelOptions) -> dict[str, Any]:
    """Return the content of the model's config.json, quantized as the options say."""
    architecture = json.loads((find_model(options.name) / "config.json").read_text("utf-8"))
    quantization = quantization_of(options)
    if quantization is None:
        return architecture
    form = NumberFormat(**quantization).options()
    # mlx has no NF4. Of its own formats, int4 is nearest in size.
    mode = "affine" if form["mode"] == "nf4" else form["mode"]
    return architecture | {"quantization": form | {"mode": mode}}


def has_turns(environment: Environment) -> bool:
    """Return whether an episode may have several turns."""
    return any(task.env is not None for task in environment.heldout(1))


def _prompt_tokens(config: TrainConfig, environment: Environment) -> int:
    folder = find_model(config.model.name)
    tokenizer = load_tokenizer(folder, {"trust_remote_code": False})
    prompts = [task.prompt for task in environment.heldout(_TASKS)]
    return max(len(encode_prompt(tokenizer, prompt)) for prompt in prompts)


def _correction_factors(config: TrainConfig, measured: RealSteps) -> dict[str, float]:
    """Return the measured peaks over the estimates for the lengths that were seen."""
    planned = estimate_memory(config, **measured.lengths).peaks
    return {name: peak / planned[name] for name, peak in measured.peaks.items()}


def _memory_rows(planned: MemoryPlan, factors: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    for name in ("weights", "reference", "adapters", "optimizer"):
        if size := planned.arrays[name].bytes:
            yield name, _megabytes(size)
    for name, peak in planned.peaks.items():
        note = f": {_megabytes(peak)} x {factors[name]:.2f} as measured" if name in factors else ""
        yield name, f"{_megabytes(peak * factors.get(name, 1))} at its peak (estimated{note})"


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"

"""Dry run: the settings of a run and an estimate of its memory, without starting the run."""

from typing import Any

from mlx_lm.utils import load_tokenizer

from textpolicy.adapters.quantization.number_formats import NumberFormat
from textpolicy.cli.answer import Answer, table
from textpolicy.cli.measured_steps import run_measured_steps
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
from textpolicy.generation.model_files import find_model, read_architecture_file
from textpolicy.generation.prompts import encode_prompt
from textpolicy.planning.memory_plan import MemoryPlan, plan_memory

_TASKS = 64
"""Held-out tasks whose prompts are measured."""
_SHOWN = ("weights", "reference", "adapters", "optimizer")
_KEYS = {"sampling": "estimated_generation_bytes", "training": "estimated_training_bytes"}


def show_plan(config: TrainConfig, *, measure: bool = False) -> Answer:
    """Answer the settings of a run and an estimate of its memory, for which no weight is read.

    With `measure`, take real steps and correct the estimate by their peaks.
    """
    find_algorithm(config.algorithm)
    environment, _ = find_task(config.task)
    prompt, completion = _prompt_tokens(config, environment), sampling_of(config, environment)
    lengths = {"prompt_tokens": prompt, "completion_tokens": completion.max_tokens}
    rows = [("prompt", f"up to {prompt} tokens in {_TASKS} held-out tasks")]
    rows.append(("completion", f"up to {completion.max_tokens} tokens"))
    data: dict[str, Any] = {"config": plain_settings(config), **lengths}
    measured, estimated = run_measured_steps(config, steps=1) if measure else None, {}
    try:
        planned = estimate_memory(config, **lengths)
        estimated = estimate_memory(config, **measured.lengths).peaks if measured else {}
    except ModelError as error:
        rows.append(("memory", f"not known: {error}"))
    else:
        shown = {name: planned.arrays[name].bytes for name in _SHOWN}
        rows += [(name, _megabytes(size)) for name, size in shown.items() if size]
        for name, peak in planned.peaks.items():
            factor = measured.peaks[name] / estimated[name] if measured else 1.0
            note = f": {_megabytes(peak)} x {factor:.2f} as measured" if measured else ""
            rows.append((name, f"{_megabytes(factor * peak)} at its peak (estimated{note})"))
            data[_KEYS[name]] = round(factor * peak)
        if has_turns(environment) and not measured:
            rows.append(("turns", "memory is that of one turn; several are not planned"))
    if measured:
        data["measured"] = {**measured.lengths, "bytes": measured.peaks, "estimated": estimated}
        sizes = ", ".join(f"{_megabytes(peak)} in {name}" for name, peak in measured.peaks.items())
        seen = " + ".join(map(str, measured.lengths.values()))
        rows.append(("measured", f"{sizes}, with up to {seen} tokens of prompt and completion"))
    return Answer(data=data, text=f"{to_toml(config)}\n{table(rows)}\nno run was started")


def estimate_memory(config: TrainConfig, prompt_tokens: int, completion_tokens: int) -> MemoryPlan:
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
    architecture = read_architecture_file(find_model(options.name))
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


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"

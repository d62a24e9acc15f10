"""What a run would take, before it is started: its settings, and an estimate of its memory."""

import json
from typing import Any

from mlx_lm.utils import load_tokenizer

from textpolicy.adapters.quantization.number_formats import NumberFormat
from textpolicy.cli.answer import Answer, table
from textpolicy.config import TrainConfig, to_toml
from textpolicy.config.sections import ModelOptions
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

_SEEN = 64
"""Held-out tasks whose prompts are measured."""


def show_plan(config: TrainConfig) -> Answer:
    """The resolved settings, and what they would take. Nothing is started, no weight is read."""
    find_algorithm(config.algorithm)
    environment, _ = find_task(config.task)
    sampling, prompt_tokens = sampling_of(config, environment), _prompt_tokens(config, environment)
    lengths = {"prompt_tokens": prompt_tokens, "completion_tokens": sampling.max_tokens}
    rows = [("prompt", f"up to {prompt_tokens} tokens in {_SEEN} held-out tasks")]
    rows.append(("completion", f"up to {sampling.max_tokens} tokens"))
    data: dict[str, Any] = {"config": plain_settings(config), **lengths}
    try:
        planned = memory_of(config, **lengths)
    except ModelError as error:
        # There are models that run and whose memory nobody has learned to foretell.
        rows.append(("memory", f"not known: {error}"))
    else:
        rows += _rows(planned)
        if plays(environment):
            rows.append(("turns", "memory is that of one turn; several are not planned"))
        data["estimated_training_bytes"] = planned.estimated_training_bytes
        data["estimated_generation_bytes"] = planned.estimated_generation_bytes
    return Answer(data=data, text=f"{to_toml(config)}\n{table(rows)}\nnothing was started")


def architecture_of(options: ModelOptions) -> dict[str, Any]:
    """The content of the model's config.json, quantized as it will be."""
    architecture = json.loads((find_model(options.name) / "config.json").read_text("utf-8"))
    quantization = quantization_of(options)
    if quantization is None:
        return architecture
    form = NumberFormat(**quantization).options()
    # mlx has no NF4; of its own formats, int4 comes nearest in size.
    mode = "affine" if form["mode"] == "nf4" else form["mode"]
    return architecture | {"quantization": form | {"mode": mode}}


def memory_of(config: TrainConfig, *, prompt_tokens: int, completion_tokens: int) -> MemoryPlan:
    """What a step of the run would take; `ModelError` for models whose memory is not known."""
    rollout, trainer, reference = config.rollout, config.trainer, config.algorithm.reference
    other = None if reference in (None, "base") else ModelOptions(name=reference)
    return plan_memory(
        architecture_of(config.model),
        adapter_config(config.adapter),
        batch=rollout.groups_per_step * rollout.group_size,
        group_size=rollout.group_size,
        micro_batch_size=trainer.micro_batch_size,
        checkpoint_gradients=trainer.checkpoint_gradients,
        dtype=dtype_of(config.model),
        reference=architecture_of(other) if other else None,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
    )


def plays(environment: Environment) -> bool:
    """Whether answers are replied to: an episode may then have several turns."""
    return any(task.env is not None for task in environment.heldout(1))


def _prompt_tokens(config: TrainConfig, environment: Environment) -> int:
    folder = find_model(config.model.name)
    tokenizer = load_tokenizer(folder, {"trust_remote_code": False})
    prompts = [task.prompt for task in environment.heldout(_SEEN)]
    return max(len(encode_prompt(tokenizer, prompt)) for prompt in prompts)


def _rows(planned: MemoryPlan) -> list[tuple[str, str]]:
    parts = {
        "weights": planned.weights,
        "reference": planned.reference,
        "adapters": planned.adapters,
        "optimizer": planned.optimizer,
        "sampling": planned.estimated_generation_bytes,
        "training": planned.estimated_training_bytes,
    }
    peaks = ("sampling", "training")
    return [
        (name, f"{size / 1e6:,.1f} MB{' at its peak (estimated)' if name in peaks else ''}")
        for name, size in parts.items()
        if size or name != "reference"
    ]

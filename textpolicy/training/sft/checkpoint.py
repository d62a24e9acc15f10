"""A run of supervised training as a checkpoint: weights, optimizer state and progress."""

from collections.abc import Mapping
from typing import Any

import mlx.nn as nn
import mlx.optimizers as optim

from textpolicy.errors import TrainingError
from textpolicy.training.checkpoint import (
    Checkpoint,
    random_state,
    restore_random_state,
    restore_training_tensors,
    training_tensors,
)

_KIND = "supervised"


def snapshot_progress(
    iteration: int, model: nn.Module, optimizer: optim.Optimizer, progress: Mapping[str, Any]
) -> Checkpoint:
    """Return the checkpoint after `iteration` updates; `progress` is what JSON can hold."""
    facts = {_KIND: dict(progress), "random": random_state()}
    return Checkpoint(step=iteration, arrays=training_tensors(model, optimizer), facts=facts)


def restore_progress(
    checkpoint: Checkpoint,
    model: nn.Module,
    optimizer: optim.Optimizer,
    data_order: Mapping[str, Any],
) -> dict[str, Any]:
    """Set weights, optimizer state and random state, and return the progress of the checkpoint.

    Nothing is changed if the checkpoint belongs to another model, optimizer or order of the data.
    """
    if _KIND not in checkpoint.facts:
        raise TrainingError(
            "the checkpoint is of a run of reinforcement learning. Resume it with train_rl or "
            "`textpolicy train --resume`"
        )
    progress: dict[str, Any] = checkpoint.facts[_KIND]
    _check_data_order(progress["data_order"], data_order)
    restore_training_tensors(checkpoint.arrays, model, optimizer)
    restore_random_state(checkpoint.facts["random"])
    return progress


def _check_data_order(then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changed = [name for name in now if then.get(name) != now[name]]
    differing = [f"{n}: {then.get(n)!r} there, {now[n]!r} now" for n in changed if n != "data"]
    if "data" in changed:
        # The data is compared by a hash, which would tell people nothing.
        differing.append(
            "data: the demonstrations differ, or their order does. Compare the file, the "
            "tokenizer, and how rows are read and split off for validation"
        )
    if changed:
        raise TrainingError(
            "the checkpoint is of a run with other data or settings:\n  "
            + "\n  ".join(differing)
            + "\nResume with the data and settings of that run, or start a new run"
        )

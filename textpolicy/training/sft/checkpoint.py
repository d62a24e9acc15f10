"""A run of supervised training as a checkpoint: weights, optimizer, random state, and progress."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.nn as nn
import mlx.optimizers as optim

from textpolicy.errors import TrainingError
from textpolicy.training.checkpoint import (
    Checkpoint,
    check_tensors_fit,
    flatten_tree,
    random_state,
    read_checkpoint,
    restore_random_state,
    unflatten_tree,
    write_checkpoint,
)

WEIGHTS, OPTIMIZER = "weights.", "optimizer."


def save_progress(
    path: Path,
    iteration: int,
    model: nn.Module,
    optimizer: optim.Optimizer,
    progress: Mapping[str, Any],
) -> None:
    """Replace the checkpoint at `path` by what is now; `progress` is anything that JSON can hold.

    Only a run with the same `progress["course"]` can be gone on with from it.
    """
    arrays = _arrays(model, optimizer)
    facts = {"supervised": dict(progress), "random": random_state()}
    write_checkpoint(path, Checkpoint(step=iteration, arrays=arrays, facts=facts))


def restore_progress(
    path: Path, model: nn.Module, optimizer: optim.Optimizer, course: Mapping[str, Any]
) -> tuple[int, dict[str, Any]]:
    """Set weights, optimizer and random state to those of the file; returns how far it had come.

    All or nothing: what does not fit the model, the optimizer or the course of the run is refused.
    """
    checkpoint = _read(path)
    progress: dict[str, Any] = checkpoint.facts["supervised"]
    _check_course(path, progress["course"], course)
    check_tensors_fit(checkpoint.arrays, _arrays(model, optimizer))
    model.update(unflatten_tree(WEIGHTS, checkpoint.arrays))
    optimizer.state = unflatten_tree(OPTIMIZER, checkpoint.arrays)
    restore_random_state(checkpoint.facts["random"])
    return checkpoint.step, progress


def checkpoint_iteration(path: Path) -> int:
    """How many updates lie behind a checkpoint."""
    return _read(path).step


def _arrays(model: nn.Module, optimizer: optim.Optimizer) -> dict[str, Any]:
    # A state that is there already is left as it is.
    optimizer.init(model.trainable_parameters())
    return flatten_tree(WEIGHTS, model.trainable_parameters()) | flatten_tree(
        OPTIMIZER, optimizer.state
    )


def _read(path: Path) -> Checkpoint:
    if not path.is_file():
        raise TrainingError(
            f"there is no checkpoint {path} to go on from; start this run from its beginning"
        )
    checkpoint = read_checkpoint(path)
    if "supervised" not in checkpoint.facts:
        raise TrainingError(f"{path} is a checkpoint of another kind than supervised training")
    return checkpoint


def _check_course(path: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changed = [name for name in now if then.get(name) != now[name]]
    differing = [f"{n}: {then.get(n)!r} there, {now[n]!r} now" for n in changed if n != "data"]
    if "data" in changed:
        # They are known by a hash, which would tell nobody anything.
        differing.append(
            "data: the demonstrations are others than those there, or in another order. Are file, "
            "tokenizer, and how rows are read and split off for validation as they were?"
        )
    if changed:
        raise TrainingError(
            f"{path} is of another run than this one:\n  " + "\n  ".join(differing) + "\n"
            "Go on with the data and settings that it was begun with, or begin anew"
        )

"""All that a run of supervised training is made of, in one file that is replaced in one step.

Trained weights, optimizer with its place on the schedule, random state, losses since the last
report, best validation: what goes on from it comes to the same numbers as what was never stopped.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from textpolicy.adapters.files import read_tensors, write_tensors
from textpolicy.errors import TrainingError

FORMAT = "textpolicy.sft"
WEIGHTS, OPTIMIZER = "weights.", "optimizer."


def write_checkpoint(
    path: Path, model: nn.Module, optimizer: optim.Optimizer, progress: Mapping[str, Any]
) -> None:
    """Replace the checkpoint at `path` by what is now; `progress` is anything that JSON can hold.

    Only a run with the same `progress["course"]` can be gone on with from it.
    """
    arrays = _named(WEIGHTS, model.trainable_parameters()) | _named(OPTIMIZER, optimizer.state)
    state = dict(progress) | {"random": cast(Any, mx.random.state)[0].tolist()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, arrays, {"format": FORMAT, "progress": json.dumps(state)})


def restore_checkpoint(
    path: Path, model: nn.Module, optimizer: optim.Optimizer, course: Mapping[str, Any]
) -> dict[str, Any]:
    """Set weights, optimizer and random state to those of the file; returns its progress.

    All or nothing: what does not fit the model, the optimizer or the course of the run is refused.
    """
    arrays, metadata = _read(path)
    progress: dict[str, Any] = json.loads(metadata["progress"])
    _check_course(path, progress["course"], course)
    optimizer.init(model.trainable_parameters())
    weights = _named(WEIGHTS, model.trainable_parameters())
    state = _named(OPTIMIZER, optimizer.state)
    _check_tensors(path, arrays, weights | state)
    model.update(_tree(WEIGHTS, arrays))
    optimizer.state = _tree(OPTIMIZER, arrays)
    high, low = progress["random"]
    # The state cannot be assigned; a seed of 64 bits is all of it.
    mx.random.seed((high << 32) | low)
    return progress


def checkpoint_iteration(path: Path) -> int:
    """How many updates lie behind a checkpoint."""
    return json.loads(_read(path)[1]["progress"])["iteration"]


def _read(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    if not path.is_file():
        raise TrainingError(
            f"there is no checkpoint {path} to go on from; start this run from its beginning"
        )
    arrays, metadata = read_tensors(path)
    if metadata.get("format") != FORMAT:
        raise TrainingError(
            f"{path} is no checkpoint of supervised training (its format is "
            f"{metadata.get('format')!r}, expected {FORMAT!r}); it ends in .checkpoint.safetensors"
        )
    return arrays, metadata


def _check_course(path: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    differing = [f"{n}: {then.get(n)!r} there, {value!r} now" for n, value in now.items()]
    differing = [d for d, n in zip(differing, now, strict=True) if then.get(n) != now[n]]
    if differing:
        raise TrainingError(
            f"{path} is of another run than this one:\n  " + "\n  ".join(differing) + "\n"
            "Go on with the data and settings that it was begun with, or begin anew"
        )


def _check_tensors(
    path: Path, found: Mapping[str, mx.array], expected: Mapping[str, mx.array]
) -> None:
    missing = [f"{name}: missing in the file" for name in expected.keys() - found.keys()]
    extra = [f"{name}: not in this run" for name in found.keys() - expected.keys()]
    shapes = [
        f"{name}: shape {found[name].shape}, here {array.shape}"
        for name, array in expected.items()
        if name in found and found[name].shape != array.shape
    ]
    if problems := sorted(missing + extra + shapes):
        more = [f"and {len(problems) - 8} more"] if len(problems) > 8 else []
        raise TrainingError(
            f"{path} does not fit this model and optimizer\n  "
            + "\n  ".join(problems[:8] + more)
            + "\nMake both as they were when the run began"
        )


def _named(prefix: str, tree: Any) -> dict[str, mx.array]:
    return cast(dict[str, mx.array], {f"{prefix}{name}": a for name, a in tree_flatten(tree)})


def _tree(prefix: str, arrays: Mapping[str, mx.array]) -> Any:
    of_prefix = {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
    return tree_unflatten(list(of_prefix.items()))

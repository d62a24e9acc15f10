"""One file holds all that a run is made of at one moment: what goes on from it comes to the same
numbers as what was never stopped.

The file appears under its name in one step, and a hash over its content tells a whole one from a
damaged one: the newest whole one is found by looking, no pointer says which it is.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from textpolicy.adapters.files import read_tensors, write_tensors
from textpolicy.errors import TextPolicyError, TrainingError

FORMAT = "textpolicy.checkpoint"
FORMAT_VERSION = "1"
SUFFIX = ".safetensors"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A run after `step` steps: tensors by name, and facts that JSON can hold."""

    step: int
    arrays: Mapping[str, mx.array]
    facts: Mapping[str, Any]


class Checkpoints:
    """The last `keep` checkpoints of a run, in a folder. One is saved every `every` steps."""

    def __init__(self, folder: Path, *, keep: int = 2, every: int = 1) -> None:
        self.folder = folder
        self.keep = keep
        self.every = every
        self.damaged: list[str] = []
        """What `newest` had to pass over, and why."""

    def due(self, step: int) -> bool:
        """Whether one is to be saved after `step` steps."""
        return step % self.every == 0

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write one more, and only then remove what is no longer among the last."""
        path = self.folder / f"{checkpoint.step:08d}{SUFFIX}"
        write_checkpoint(path, checkpoint)
        # A run that went on from an older one leaves newer ones behind: those of another course.
        course = [p for p in self._paths() if p.stem <= path.stem]
        for other in set(self._paths()) - set(course[-self.keep :]):
            other.unlink()
        return path

    def newest(self) -> Checkpoint | None:
        """The newest that is whole, or None where there is none at all."""
        self.damaged = []
        for path in reversed(self._paths()):
            try:
                return read_checkpoint(path)
            except TextPolicyError as error:
                self.damaged.append(str(error))
        if self.damaged:
            raise TrainingError(
                f"no checkpoint in {self.folder} is whole:\n  " + "\n  ".join(self.damaged) + "\n"
                "Start the run again from its beginning"
            )
        return None

    def _paths(self) -> list[Path]:
        # Temporary files begin with a dot.
        return sorted(p for p in self.folder.glob(f"*{SUFFIX}") if p.stem.isdecimal())


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Replace the file at `path` in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps({"step": checkpoint.step, "facts": checkpoint.facts})
    write_tensors(
        path,
        checkpoint.arrays,
        {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "content": content,
            "sha256": _digest(checkpoint.arrays, content),
        },
    )


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a file, if it is whole to the last bit."""
    arrays, metadata = read_tensors(path)
    found = metadata.get("format"), metadata.get("format_version")
    if found != (FORMAT, FORMAT_VERSION):
        raise TrainingError(
            f"{path} is no checkpoint that this release reads: its format is {found}, expected "
            f"{(FORMAT, FORMAT_VERSION)}"
        )
    content = metadata.get("content", "")
    if _digest(arrays, content) != metadata.get("sha256"):
        raise TrainingError(f"{path} is damaged: its content is not what was written")
    return Checkpoint(arrays=arrays, **json.loads(content))


def remove_partial(folder: Path) -> None:
    """Remove what a killed process was writing in the folder when it ended."""
    for path in folder.glob(f".*{SUFFIX}"):
        path.unlink()


def flat(prefix: str, tree: Any) -> dict[str, mx.array]:
    """The arrays of a tree of parameters or optimizer state, by names that begin with `prefix`."""
    return cast(dict[str, mx.array], {f"{prefix}{name}": a for name, a in tree_flatten(tree)})


def tree(prefix: str, arrays: Mapping[str, mx.array]) -> Any:
    """The tree whose arrays `flat` named with this prefix."""
    named = {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
    return tree_unflatten(list(named.items()))


def check_fits(found: Mapping[str, mx.array], expected: Mapping[str, mx.array]) -> None:
    """Refuse tensors that are not those of the model and the optimizer at hand."""
    if problems := sorted(_misfits(found, expected)):
        more = [f"and {len(problems) - 8} more"] if len(problems) > 8 else []
        raise TrainingError(
            "a checkpoint does not fit this model and optimizer\n  "
            + "\n  ".join(problems[:8] + more)
            + "\nMake both as they were when the run began"
        )


def random_state() -> list[int]:
    """The state of mlx's own random numbers."""
    return cast(Any, mx.random.state)[0].tolist()


def restore_random_state(state: list[int]) -> None:
    """Go on with mlx's random numbers from `random_state()`."""
    high, low = state
    # The state cannot be assigned; a seed of 64 bits is all of it.
    mx.random.seed((high << 32) | low)


def _misfits(found: Mapping[str, mx.array], expected: Mapping[str, mx.array]) -> Iterator[str]:
    yield from (f"{name}: missing in the file" for name in expected.keys() - found.keys())
    yield from (f"{name}: not in this run" for name in found.keys() - expected.keys())
    for name in found.keys() & expected.keys():
        if (there := found[name].shape) != (here := expected[name].shape):
            yield f"{name}: shape {there}, here {here}"


def _digest(arrays: Mapping[str, mx.array], content: str) -> str:
    digest = hashlib.sha256(content.encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.asarray(array.reshape(-1).view(mx.uint8)).data)
    return digest.hexdigest()

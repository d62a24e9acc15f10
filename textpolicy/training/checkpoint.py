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

from textpolicy.adapters.files.tensor_file import read_tensors, remove_partial_files, write_tensors
from textpolicy.errors import AdapterError, ConfigError, TextPolicyError, TrainingError

_FORMAT = "textpolicy.checkpoint"
_FORMAT_VERSION = "3"
_SUFFIX = ".safetensors"
# A tensor, since mlx reads no file whose header is over 100 MB, and rollouts can be more than that.
_CONTENT = "content.json"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A run after `step` steps: tensors by name, and facts that JSON can hold."""

    step: int
    arrays: Mapping[str, mx.array]
    facts: Mapping[str, Any]


class Checkpoints:
    """The last `keep` checkpoints of a run, in a folder. One is saved every `every` steps."""

    def __init__(self, folder: Path, *, keep: int = 2, every: int = 1) -> None:
        for name, value in (("keep", keep), ("every", every)):
            if value < 1:
                raise ConfigError(f"{name} is {value}; expected a whole number, at least 1")
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
        path = self.folder / f"{checkpoint.step:08d}{_SUFFIX}"
        remove_partial_files(self.folder)
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
        return sorted(p for p in self.folder.glob(f"*{_SUFFIX}") if p.stem.isdecimal())


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Replace the file at `path` in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {**checkpoint.arrays, _CONTENT: _content(checkpoint)}
    metadata = {"format": _FORMAT, "format_version": _FORMAT_VERSION, "sha256": _digest(arrays)}
    try:
        write_tensors(path, arrays, metadata)
    except AdapterError as error:
        raise TrainingError(
            f"no checkpoint was saved after step {checkpoint.step}; an earlier one is still as it "
            f"was\n{error}"
        ) from error


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a file, if it is whole to the last bit."""
    arrays, metadata = read_tensors(path)
    found = metadata.get("format"), metadata.get("format_version")
    if found != (_FORMAT, _FORMAT_VERSION):
        raise TrainingError(
            f"{path} is no checkpoint that this release reads: its format is {found}, expected "
            f"{(_FORMAT, _FORMAT_VERSION)}"
        )
    if _digest(arrays) != metadata.get("sha256"):
        raise TrainingError(f"{path} is damaged: its content is not what was written")
    content = json.loads(bytes(_bytes(arrays.pop(_CONTENT))))
    return Checkpoint(arrays=arrays, **content)


def flatten_tree(prefix: str, tree: Any) -> dict[str, mx.array]:
    """The arrays of a tree of parameters or optimizer state, by names that begin with `prefix`."""
    return cast(dict[str, mx.array], {f"{prefix}{name}": a for name, a in tree_flatten(tree)})


def unflatten_tree(prefix: str, arrays: Mapping[str, mx.array]) -> Any:
    """The tree whose arrays `flat` named with this prefix."""
    named = {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
    return tree_unflatten(list(named.items()))


def check_tensors_fit(found: Mapping[str, mx.array], expected: Mapping[str, mx.array]) -> None:
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
        there, here = found[name], expected[name]
        if there.shape != here.shape:
            yield f"{name}: shape {there.shape}, here {here.shape}"
        elif there.dtype != here.dtype:
            yield f"{name}: {there.dtype}, here {here.dtype}"


def _content(checkpoint: Checkpoint) -> mx.array:
    try:
        text = json.dumps({"step": checkpoint.step, "facts": checkpoint.facts})
    except TypeError as error:
        raise TrainingError(
            f"no checkpoint can be made after step {checkpoint.step}: {error}. What a curriculum "
            "says in state(), and what environments answer, has to be what JSON can hold"
        ) from error
    return mx.array(np.frombuffer(text.encode(), np.uint8))


def _digest(arrays: Mapping[str, mx.array]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(_bytes(array))
    return digest.hexdigest()


def _bytes(array: mx.array) -> memoryview:
    return np.asarray(array.reshape(-1).view(mx.uint8)).data

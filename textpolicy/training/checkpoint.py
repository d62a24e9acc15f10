"""Checkpoints: files from which a run is resumed to the same numbers as without a stop.

A checkpoint file appears under its name in one step, and a hash over its content shows damage. The
newest undamaged file is found by reading the files; no pointer names it.
"""

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from textpolicy.activity import doing
from textpolicy.adapters.adapter import bytes_of, digest_of
from textpolicy.adapters.files.tensor_file import read_tensors, write_tensors
from textpolicy.errors import ConfigError, TextPolicyError, TrainingError, UnwritableError
from textpolicy.file_writing import flush_to_disk, make_private_folder, remove_partial_files
from textpolicy.ranks import ALONE, Ranks
from textpolicy.untrusted.parsing import parse_json

_FORMAT = "textpolicy.checkpoint"
_FORMAT_VERSION = "4"
_SUFFIX = ".safetensors"
# A tensor, because mlx reads no header over 100 MB, and rollouts can be larger.
_CONTENT = "content.json"
_WEIGHTS, _OPTIMIZER = "weights.", "optimizer."
# Facts of a rank: its share of the rewards, and the global random numbers of the user's code.
_OF_RANK = ("scorer", "random")
_RANKS = "ranks"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The state of a run after `step` steps: tensors by name, and facts that JSON can hold."""

    step: int
    arrays: Mapping[str, mx.array]
    facts: Mapping[str, Any]


class Checkpoints:
    """The last `keep` checkpoints of a run in a folder, one every `every` steps.

    All `ranks` of a run save at the same steps, and the first one writes. The disk has the content
    of the files `after` before it has a checkpoint: a resumed run goes on after their last rows.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int = 2,
        every: int = 1,
        ranks: Ranks = ALONE,
        after: Sequence[Path] = (),
    ) -> None:
        for name, value in (("keep", keep), ("every", every)):
            if value < 1:
                raise ConfigError(f"{name} is {value}; expected a whole number, at least 1")
        self.folder = folder
        self.keep = keep
        self.every = every
        self.ranks = ranks
        self.after = after
        self.damaged: list[str] = []
        """The damaged checkpoints that `newest` skipped, and why."""
        self.facts: dict[str, Callable[[], Any]] = {}
        """What each checkpoint holds beside the state of training, by name, as JSON values."""

    def due(self, step: int) -> bool:
        """Return whether a checkpoint is due after `step` steps."""
        return step % self.every == 0

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write a checkpoint, then remove those that are no longer among the last."""
        self.freeze(checkpoint)()
        return self.path_of(checkpoint)

    def freeze(self, checkpoint: Checkpoint) -> Callable[[], None]:
        """Return a function that saves the state of now, whatever the run does until its call."""
        whole = join_ranks_of(checkpoint, self.ranks)
        return self._freeze(whole) if self.ranks.is_first else lambda: None

    def rewrite(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint of all ranks, with the `facts` as they are now."""
        self._freeze(checkpoint)()

    def _freeze(self, checkpoint: Checkpoint) -> Callable[[], None]:
        more = {name: fact() for name, fact in self.facts.items()}
        arrays = tensors_of(replace(checkpoint, facts={**checkpoint.facts, **more}))
        mx.eval(arrays)
        return partial(self._write, checkpoint, arrays)

    @doing("saving a checkpoint")
    def _write(self, checkpoint: Checkpoint, arrays: Mapping[str, mx.array]) -> None:
        path = self.path_of(checkpoint)
        remove_partial_files(self.folder)
        for rows in self.after:
            if rows.exists():
                flush_to_disk(rows)
        write_checkpoint(path, checkpoint.step, arrays)
        # A run that was resumed from an older checkpoint must not keep the newer ones.
        kept = [p for p in self._paths() if p.stem <= path.stem]
        for other in set(self._paths()) - set(kept[-self.keep :]):
            other.unlink()

    def path_of(self, checkpoint: Checkpoint) -> Path:
        """Return the file of a checkpoint."""
        return self.folder / f"{checkpoint.step:08d}{_SUFFIX}"

    def newest(self) -> Checkpoint | None:
        """Return the newest undamaged checkpoint, or None if the folder has none."""
        self.damaged = []
        for path in reversed(self._paths()):
            try:
                return read_checkpoint(path)
            except TextPolicyError as error:
                self.damaged.append(str(error))
        if self.damaged:
            raise TrainingError(
                f"every checkpoint in {self.folder} is damaged:\n  "
                + "\n  ".join(self.damaged)
                + "\nStart the run again from its beginning"
            )
        return None

    def _paths(self) -> list[Path]:
        # Temporary files begin with a dot.
        return sorted(p for p in self.folder.glob(f"*{_SUFFIX}") if p.stem.isdecimal())


def join_ranks_of(checkpoint: Checkpoint, ranks: Ranks) -> Checkpoint:
    """Return the checkpoint with what differs by rank. Raise if weights differ among ranks."""
    if ranks.size == 1:
        return checkpoint
    ranks.require_equal(digest_of(checkpoint.arrays), "the weights or the optimizer states")
    own = {name: checkpoint.facts[name] for name in _OF_RANK if name in checkpoint.facts}
    return replace(checkpoint, facts={**checkpoint.facts, _RANKS: ranks.gather_json(own)})


def ranks_in(checkpoint: Checkpoint) -> int:
    """Return the number of ranks of the run that made the checkpoint."""
    return len(checkpoint.facts.get(_RANKS, [{}]))


def part_of_rank(checkpoint: Checkpoint, ranks: Ranks) -> Checkpoint:
    """Return the checkpoint with the facts of this rank, if as many ranks have made it."""
    if ranks.size == 1 or ranks_in(checkpoint) != ranks.size:
        return checkpoint
    own = checkpoint.facts[_RANKS][ranks.rank]
    return replace(checkpoint, facts={**checkpoint.facts, **own})


def tensors_of(checkpoint: Checkpoint) -> dict[str, mx.array]:
    """Return what the file of a checkpoint holds."""
    return {**checkpoint.arrays, _CONTENT: _content(checkpoint)}


def write_checkpoint(path: Path, step: int, arrays: Mapping[str, mx.array]) -> None:
    """Write the tensors of a checkpoint to `path` atomically, in place of any file there."""
    make_private_folder(path.parent)
    metadata = {"format": _FORMAT, "format_version": _FORMAT_VERSION, "sha256": digest_of(arrays)}
    try:
        write_tensors(path, arrays, metadata)
    except UnwritableError as error:
        raise UnwritableError(
            f"no checkpoint was saved after step {step}; earlier checkpoints are unchanged\n{error}"
        ) from error


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint; raise TrainingError if the file is damaged or of another format."""
    arrays, metadata = read_tensors(path)
    found = metadata.get("format"), metadata.get("format_version")
    if found != (_FORMAT, _FORMAT_VERSION):
        raise TrainingError(
            f"{path} is not a checkpoint of this release: its format is {found}, expected "
            f"{(_FORMAT, _FORMAT_VERSION)}. Resume it with the release that wrote it"
        )
    if digest_of(arrays) != metadata.get("sha256"):
        raise TrainingError(f"{path} is damaged: its content differs from what was written")
    # Metrics of a rollout, and a best reward that is not there yet, may be infinite.
    content = parse_json(bytes(bytes_of(arrays.pop(_CONTENT))), constants=True)
    return Checkpoint(arrays=arrays, **content)


def training_tensors(model: nn.Module, optimizer: optim.Optimizer) -> dict[str, mx.array]:
    """Return the trainable weights and the optimizer state by name."""
    weights = model.trainable_parameters()
    # Creates the optimizer state before the first update; an existing state is not changed.
    optimizer.init(weights)
    return _flatten(_WEIGHTS, weights) | _flatten(_OPTIMIZER, optimizer.state)


def check_base(then: str | None, now: str | None) -> None:
    """Raise TrainingError if the fingerprint of the base model is not that of the checkpoint."""
    if then != now:
        raise TrainingError(
            f"the checkpoint was made with a model of fingerprint {then}, and this model has "
            f"fingerprint {now}. Resume with the model and the quantization that the run began with"
        )


def restore_training_tensors(
    tensors: Mapping[str, mx.array], model: nn.Module, optimizer: optim.Optimizer
) -> None:
    """Set weights and optimizer state; change nothing if the tensors are of another model.

    The optimizer keeps its own learning rate and schedule.
    """
    if problems := sorted(_misfits(tensors, training_tensors(model, optimizer))):
        more = [f"and {len(problems) - 8} more"] if len(problems) > 8 else []
        raise TrainingError(
            "a checkpoint does not fit this model and optimizer:\n  "
            + "\n  ".join(problems[:8] + more)
            + "\nMake both as they were when the run was started"
        )
    model.update(_unflatten(_WEIGHTS, tensors))
    rate = optimizer.learning_rate
    optimizer.state = _unflatten(_OPTIMIZER, tensors)
    # mlx 0.29 to 0.32 compute a scheduled rate in each update, and keep any other in the state.
    if "learning_rate" not in vars(optimizer)["_schedulers"]:
        optimizer.learning_rate = rate


def _flatten(prefix: str, tree: Any) -> dict[str, mx.array]:
    return cast(dict[str, mx.array], {f"{prefix}{name}": a for name, a in tree_flatten(tree)})


def _unflatten(prefix: str, arrays: Mapping[str, mx.array]) -> Any:
    named = {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
    return tree_unflatten(list(named.items()))


def random_state() -> list[int]:
    """Return the state of mlx's random numbers."""
    return cast(Any, mx.random.state)[0].tolist()


def restore_random_state(state: list[int]) -> None:
    """Restore a state that `random_state()` returned."""
    high, low = state
    # The state cannot be assigned, but a seed of 64 bits is the whole state.
    mx.random.seed((high << 32) | low)


def seed_random_numbers(seed: int) -> None:
    """Seed the global random numbers of mlx, Python and numpy."""
    mx.random.seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def random_states() -> dict[str, list[Any]]:
    """Return the states of the global random numbers of mlx, Python and numpy, as JSON values."""
    version, words, gauss = random.getstate()
    kind, keys, *rest = cast(tuple[Any, ...], np.random.get_state())
    return {
        "mlx": random_state(),
        "python": [version, list(words), gauss],
        "numpy": [kind, keys.tolist(), *rest],
    }


def restore_random_states(states: Mapping[str, list[Any]]) -> None:
    """Restore states that `random_states()` returned."""
    restore_random_state(states["mlx"])
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(tuple(states["numpy"]))


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
            f"no checkpoint can be made after step {checkpoint.step}: {error}. The state() of a "
            "curriculum and the answers of environments must be values that JSON can hold"
        ) from error
    return mx.array(np.frombuffer(text.encode(), np.uint8))

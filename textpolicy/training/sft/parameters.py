"""The numbers of a run of supervised training."""

from dataclasses import dataclass
from pathlib import Path

from textpolicy.errors import ConfigError
from textpolicy.types import check_fields


@dataclass(frozen=True, kw_only=True)
class SFTParameters:
    """`iterations` are updates in all, `completed_iterations` those of them that lie behind."""

    batch_size: int = 4
    """Rows in memory at once."""
    iterations: int = 1000
    steps_per_report: int = 10
    steps_per_eval: int = 100
    validation_batches: int = 10
    """How many batches of the validation data to look at; 0 is all of it."""
    save_every: int = 100
    adapter_path: Path | str | None = None
    """A .safetensors file for the adapters. The best ones and the state to go on from are kept
    beside it, or where the next two say."""
    best_path: Path | str | None = None
    checkpoint_path: Path | str | None = None
    completed_iterations: int = 0
    """Data begins after these, as if they had been trained on. With a checkpoint it is known."""
    accumulation: int = 1
    """Batches whose gradients are one update: the update of one batch as large as all of them."""
    packing: bool = False
    """Several demonstrations to a row of `max_length` tokens, kept apart."""
    max_length: int = 2048
    """Tokens of a packed row, and where texts that are given as text are cut."""
    checkpoint_gradients: bool = False
    """Compute activations again in the backward pass: less memory, more time, the same update."""
    patience: int | None = None
    """Validations in a row without a better loss after which training ends; None is never."""
    seed: int = 0

    def __post_init__(self) -> None:
        count = (int, lambda x: x >= 1, "a whole number, at least 1")
        natural = (int, lambda x: x >= 0, "a whole number, 0 or more")
        path = (Path | str | None, lambda _: True, "a path, or None")
        check_fields(
            self,
            batch_size=count,
            iterations=natural,
            steps_per_report=count,
            steps_per_eval=count,
            validation_batches=natural,
            save_every=count,
            adapter_path=path,
            best_path=path,
            checkpoint_path=path,
            completed_iterations=natural,
            accumulation=count,
            max_length=(int, lambda x: x >= 2, "a whole number, at least 2"),
            patience=(int | None, lambda x: x is None or x >= 1, "at least 1, or None"),
        )
        if self.completed_iterations > self.iterations:
            raise ConfigError(
                f"completed_iterations is {self.completed_iterations} of {self.iterations} "
                "iterations in all; expected no more than those"
            )
        if self.checkpoint_path is not None and self.adapter_path is None:
            raise ConfigError(
                f"checkpoint_path is {self.checkpoint_path}, and checkpoints are written when "
                "adapters are saved; give adapter_path too"
            )

    @property
    def adapter_file(self) -> Path | None:
        """Where adapters go."""
        return _path(self.adapter_path)

    @property
    def best_file(self) -> Path | None:
        """Where the adapters with the lowest validation loss go."""
        return _path(self.best_path) or _beside(self.adapter_file, "best")

    @property
    def checkpoint_file(self) -> Path | None:
        """Where the state to go on from goes."""
        return _path(self.checkpoint_path) or _beside(self.adapter_file, "checkpoint")


def _path(given: Path | str | None) -> Path | None:
    return None if given is None else Path(given).expanduser()


def _beside(path: Path | None, what: str) -> Path | None:
    return path and path.with_name(f"{path.stem}.{what}{path.suffix}")

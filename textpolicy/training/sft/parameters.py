"""The settings of supervised training from Python, and the events that its callback gets."""

from dataclasses import dataclass
from pathlib import Path

from textpolicy.errors import ConfigError
from textpolicy.types import check_fields


@dataclass(frozen=True, kw_only=True)
class SFTParameters:
    """`iterations` counts all updates, `completed_iterations` those that are already done."""

    batch_size: int = 4
    """Rows in memory at once."""
    iterations: int = 1000
    steps_per_report: int = 10
    steps_per_eval: int = 100
    validation_batches: int = 10
    """Batches of the validation data to measure; 0 is all."""
    save_every: int = 100
    adapter_path: Path | str | None = None
    """A .safetensors file for the adapters, written every `save_every` updates and at the end."""
    best_path: Path | str | None = None
    """A file for the adapters of the lowest validation loss; None is a file beside the first."""
    completed_iterations: int = 0
    """Training starts after these updates, with the data that follows. A checkpoint knows them."""
    accumulation: int = 1
    """Batches that make one update: the same update as that of one batch of all their rows."""
    packing: bool = False
    """Put several demonstrations into a row of `max_length` tokens; none sees another."""
    max_length: int = 2048
    """Tokens of a packed row, and the length at which texts are cut."""
    checkpoint_gradients: bool = False
    """Recompute activations in the backward pass: less memory, more time, the same update."""
    patience: int | None = None
    """Validations in a row without a lower loss that end training; None is no limit."""
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
            completed_iterations=natural,
            accumulation=count,
            max_length=(int, lambda x: x >= 2, "a whole number, at least 2"),
            patience=(int | None, lambda x: x is None or x >= 1, "at least 1, or None"),
        )
        if self.completed_iterations > self.iterations:
            raise ConfigError(
                f"completed_iterations is {self.completed_iterations}, and iterations is "
                f"{self.iterations}; expected at most as many completed iterations"
            )

    @property
    def adapter_file(self) -> Path | None:
        """The file of the adapters."""
        return _path(self.adapter_path)

    @property
    def best_file(self) -> Path | None:
        """The file of the adapters with the lowest validation loss."""
        path = self.adapter_file
        return _path(self.best_path) or (path and path.with_name(f"{path.stem}.best{path.suffix}"))


def _path(given: Path | str | None) -> Path | None:
    return None if given is None else Path(given).expanduser()


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainReport:
    """The mean loss over learned tokens since the last report, and the speed of this process.

    `iteration` counts finished updates. The speed leaves out the time of validation and saving;
    `tokens_per_second` counts learned tokens.
    """

    iteration: int
    loss: float
    iterations_per_second: float
    tokens_per_second: float
    learning_rate: float

    def __str__(self) -> str:
        return (
            f"iteration {self.iteration}: training loss {self.loss:.4f}, "
            f"{self.iterations_per_second:.2f} iterations/s, "
            f"{self.tokens_per_second:,.0f} tokens/s"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationReport:
    """The mean loss over the tokens of the validation data, and the seconds that it took."""

    iteration: int
    loss: float
    seconds: float

    def __str__(self) -> str:
        return f"iteration {self.iteration}: validation loss {self.loss:.4f} ({self.seconds:.1f} s)"


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveReport:
    """The adapters were written to `path`."""

    iteration: int
    path: Path

    def __str__(self) -> str:
        return f"iteration {self.iteration}: saved {self.path}"


SFTEvent = TrainReport | ValidationReport | SaveReport

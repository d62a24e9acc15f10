"""The events that supervised training reports to its callback."""

from dataclasses import dataclass
from pathlib import Path


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

"""What a run of supervised training tells while it goes, and what it is answered."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainReport:
    """Since the last report: mean loss over learned tokens, and rates of this process.

    `iteration` counts finished updates. The rates are those of the updates alone, without what
    validation and saving took; `tokens_per_second` counts tokens that were learned.
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
    """The mean loss over the tokens of the validation data, and how long it took."""

    iteration: int
    loss: float
    seconds: float

    def __str__(self) -> str:
        return f"iteration {self.iteration}: validation loss {self.loss:.4f} ({self.seconds:.1f} s)"


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveReport:
    """The adapters were written to `path`, and the state to go on from beside them."""

    iteration: int
    path: Path

    def __str__(self) -> str:
        return f"iteration {self.iteration}: saved {self.path}"


Event = TrainReport | ValidationReport | SaveReport

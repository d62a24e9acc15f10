"""The config of a run of supervised training."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from textpolicy.config.sections import (
    CHECKPOINT_GRADIENTS,
    FINAL_LR,
    LR,
    SCHEDULE,
    WARMUP,
    WEIGHT_DECAY,
    AdapterOptions,
    ModelOptions,
    Schedule,
    TrackingOptions,
)
from textpolicy.config.settings import SEED, above, at_least, check, option
from textpolicy.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """What is learned."""

    source: str | None = option(
        None,
        "a folder with train, valid and test as .jsonl or .txt, one file of rows, or hf:NAME",
        unset="none, and it has to be given",
        flag="--data",
        metavar="DIR",
    )
    learn: Literal["answers", "everything"] = option("answers", "what of a row is learned")
    system: str | None = option(None, "system message of conversations that have none")
    max_length: int = option(
        2048,
        "tokens at which a row is cut, which is reported, and the length of packed rows",
        limit=at_least(2),
    )
    validation_share: float = option(
        0.1,
        "share of the rows to validate on where the data has no valid part; 0 is none",
        limit=at_least(0),
    )
    packing: bool = option(
        False, "fill rows of --max-length tokens with several demonstrations, kept apart"
    )

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class SFTTrainerOptions:
    """How the weights move."""

    iterations: int | None = option(
        None,
        "updates to take in all",
        unset="1000",
        limit=at_least(1),
        instead_of="epochs",
    )
    epochs: int | None = option(
        None,
        "times to go through the data; not beside iterations",
        unset="as --iterations has it",
        limit=at_least(1),
        instead_of="iterations",
    )
    batch_size: int = option(4, "rows in memory at once", limit=at_least(1))
    accumulation: int = option(1, "batches whose gradients make one update", limit=at_least(1))
    lr: float = option(2e-4, LR, limit=above(0))
    schedule: Schedule = option(*SCHEDULE)
    warmup: int = option(*WARMUP, limit=at_least(0))
    final_lr: float = option(*FINAL_LR, limit=at_least(0))
    weight_decay: float = option(*WEIGHT_DECAY, limit=at_least(0))
    checkpoint_gradients: bool = option(*CHECKPOINT_GRADIENTS)
    patience: int | None = option(
        None,
        "validations in a row without a better loss that end the run",
        unset="no limit",
        limit=at_least(1),
    )

    def __post_init__(self) -> None:
        check(self)
        if self.iterations and self.epochs:
            raise ConfigError("both iterations and epochs are given; expected one of them")


@dataclass(frozen=True, kw_only=True)
class SFTRunOptions:
    """From which seed it goes, what it tells on the way, and where it is kept."""

    output: Path | None = option(
        None,
        "folder for the adapters, checkpoint, metrics and report",
        unset="a new one in runs",
        metavar="DIR",
    )
    seed: int = option(0, "makes the run repeatable", limit=SEED)
    steps_per_report: int = option(10, "updates in a report", limit=at_least(1))
    steps_per_eval: int = option(100, "updates from one validation to the next", limit=at_least(1))
    validation_batches: int = option(10, "batches to validate on; 0 is all", limit=at_least(0))
    save_every: int = option(100, "updates from one save to the next", limit=at_least(1))

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """One run of supervised training."""

    data: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    trainer: SFTTrainerOptions = field(default_factory=SFTTrainerOptions)
    tracking: TrackingOptions = field(default_factory=TrackingOptions)
    run: SFTRunOptions = field(default_factory=SFTRunOptions)

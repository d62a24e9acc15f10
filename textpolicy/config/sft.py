"""Every option of `textpolicy sft`, as in `config/train.py`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from textpolicy.config.option_types import Table
from textpolicy.config.settings import SEED, above, at_least, check, option
from textpolicy.config.train import (
    CHECKPOINT_GRADIENTS,
    COLUMNS,
    COLUMNS_UNSET,
    DATA_HELP,
    DEADLINE_UNSET,
    FINAL_LR,
    LIMITS,
    LR,
    PROMPT,
    PROMPT_UNSET,
    SCHEDULE,
    STEP_DEADLINE,
    STOP_ON_STALL,
    SYSTEM,
    WARMUP,
    WEIGHT_DECAY,
    AdapterOptions,
    HeadSizeOptions,
    ModelOptions,
    Schedule,
    TrackingOptions,
)
from textpolicy.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The rows of text to learn from."""

    source: str | None = option(
        None,
        "rows of text: a folder with train, valid and test as .jsonl or .txt, one file, or an "
        "address as of hf:OWNER/NAME[@REVISION][:CONFIG][:SPLIT]",
        unset="none; it is required",
        flag="--data",
        metavar="DIR",
    )
    eval_data: str | None = option(
        None,
        DATA_HELP.format("rows to validate on"),
        unset="the valid part of --data, or a share of its rows",
        metavar="FILE",
    )
    columns: Table | None = option(*COLUMNS, unset=COLUMNS_UNSET)
    prompt: str | None = option(*PROMPT, unset=PROMPT_UNSET)
    gold_column: str | None = option(
        None,
        "column of right answers in --data, which the model learns to give",
        unset="the column 'completion'",
        metavar="NAME",
    )
    learn: Literal["answers", "everything"] = option("answers", "the part of a row that is learned")
    system: str | None = option(None, SYSTEM, metavar="TEXT|FILE")
    max_length: int = option(
        2048,
        "tokens after which a row is cut, and the length of packed rows; cut rows are reported",
        limit=at_least(2),
    )
    validation_share: float = option(
        0.1,
        "share of the rows to validate on if the data has no valid part; 0 is none",
        limit=at_least(0),
    )
    packing: bool = option(
        False,
        "fill rows of --max-length tokens with several demonstrations, which do not see each other",
    )

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class SFTTrainerOptions:
    """Length, batches and learning rate of training."""

    iterations: int | None = option(
        None, "number of updates", unset="1000", limit=at_least(1), instead_of="epochs"
    )
    epochs: int | None = option(
        None,
        "passes through the data, instead of --iterations",
        unset="as many as --iterations needs",
        limit=at_least(1),
        instead_of="iterations",
    )
    batch_size: int = option(4, "rows in memory at once", limit=at_least(1))
    accumulation: int = option(1, "batches that make one update", limit=at_least(1))
    lr: float = option(2e-4, LR, limit=above(0))
    schedule: Schedule = option(*SCHEDULE)
    warmup: int = option(*WARMUP, limit=at_least(0))
    final_lr: float = option(*FINAL_LR, limit=at_least(0))
    weight_decay: float = option(*WEIGHT_DECAY, limit=at_least(0))
    checkpoint_gradients: bool = option(*CHECKPOINT_GRADIENTS)
    patience: int | None = option(
        None,
        "validations in a row without a lower loss after which the run ends",
        unset="no limit",
        limit=at_least(1),
    )

    def __post_init__(self) -> None:
        check(self)
        if self.iterations and self.epochs:
            raise ConfigError(
                "both iterations and epochs are given; expected one of them. Leave out one"
            )


@dataclass(frozen=True, kw_only=True)
class SFTRunOptions:
    """Seed, output folder, and how often the run reports, validates and saves."""

    output: Path | None = option(
        None,
        "folder for the adapters, checkpoints, metrics and report",
        unset="a new folder in runs",
        metavar="DIR",
    )
    seed: int = option(0, "seed of all random numbers; the same seed repeats the run", limit=SEED)
    steps_per_report: int = option(10, "updates between two reports", limit=at_least(1))
    eval_every: int = option(100, "updates between two validations", limit=at_least(1))
    validation_batches: int = option(
        10, "batches to validate on; 0 is all of them", limit=at_least(0)
    )
    checkpoint_every: int = option(
        100, "updates between two saves of adapters and checkpoint", limit=at_least(1)
    )
    step_deadline: float | None = option(
        *STEP_DEADLINE, unset=DEADLINE_UNSET, metavar="SECONDS", limit=above(0)
    )
    stop_on_stall: bool = option(*STOP_ON_STALL)
    limits: Literal["refuse", "warn"] = option(*LIMITS)

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """One run of supervised training."""

    data: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    trainer: SFTTrainerOptions = field(default_factory=SFTTrainerOptions)
    sizes: HeadSizeOptions = field(default_factory=HeadSizeOptions)
    tracking: TrackingOptions = field(default_factory=TrackingOptions)
    run: SFTRunOptions = field(default_factory=SFTRunOptions)

"""Where a run's numbers go: the files of its directory, and the services that were asked for."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from textpolicy.config import SFTConfig, TrainConfig, settings_of
from textpolicy.runs import RunDirectory
from textpolicy.tracking.console import Console, terminal_safe
from textpolicy.tracking.open import ServiceOptions, open_tracker
from textpolicy.tracking.tracker import Tracker


def tracker_of(
    config: TrainConfig | SFTConfig,
    directory: RunDirectory,
    console: Console,
    *,
    resume_step: int = 0,
    sample_groups: int | None = None,
) -> Tracker:
    """The tracker of a run, which goes on from `resume_step`."""
    return open_tracker(
        directory,
        ServiceOptions(**asdict(config.tracking)),
        plain(config),
        notice=lambda text: console.note(terminal_safe(text)),
        resume_step=resume_step,
        sample_groups=sample_groups,
    )


def plain(config: TrainConfig | SFTConfig) -> dict[str, Any]:
    """Every setting by its key, in values that JSON can hold."""
    values = {setting.key: setting.default for setting in settings_of(config)}
    return {k: str(value) if isinstance(value, Path) else value for k, value in values.items()}

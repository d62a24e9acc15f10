"""The tracker of a run directory: its files, and the services that were asked for."""

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from textpolicy.errors import ConfigError
from textpolicy.runs import RunDirectory
from textpolicy.tracking.background_sink import BackgroundSink, Notify
from textpolicy.tracking.jsonl import RunFiles
from textpolicy.tracking.sink import Sink
from textpolicy.tracking.tensorboard import TensorBoardRun
from textpolicy.tracking.tracker import CLOSING_SHARE, PATIENCE, Tracker
from textpolicy.tracking.trackio_run import TrackioRun
from textpolicy.tracking.wandb_run import WandbRun

_TENSORBOARD_FOLDER = "tensorboard"
_ID_FILE = ".tracking-id"


@dataclass(frozen=True, kw_only=True)
class ServiceOptions:
    """What a run is logged to beside its files."""

    wandb: str | None = None
    """A project of Weights & Biases."""
    wandb_artifacts: bool = False
    """Whether the latest and the best adapter are uploaded at the end."""
    tensorboard: bool = False
    """Whether event files are written into the run's directory."""
    trackio: str | None = None
    """A project of trackio."""


def open_tracker(
    directory: RunDirectory,
    services: ServiceOptions,
    config: Mapping[str, Any],
    *,
    notice: Callable[[str], None],
    resume_step: int = 0,
    sample_groups: int | None = None,
    patience: float = PATIENCE,
) -> Tracker:
    """Begin to record, or go on: rows of `resume_step` and later steps are written anew.

    Of each step's samples the first `sample_groups` groups are kept, all unless said otherwise; 0
    leaves the file out. `notice` gets a line for people when a sink has something to say.
    The run waits for no service but at its end, and then for `patience` seconds; one whose package
    is missing is an error.
    """
    _check_installed(services)
    # What is there from before loses its rows of later steps even if none are added.
    wanted = sample_groups != 0 or directory.samples.exists()
    samples = directory.samples if wanted else None
    files = RunFiles(directory.metrics, samples, resume_step=resume_step)
    makers = _makers(directory, services, config, resume_step, patience)
    return Tracker(
        [files],
        [BackgroundSink(name, make) for name, make in makers.items()],
        notice=notice,
        patience=patience,
        sample_groups=sample_groups,
    )


def _makers(
    directory: RunDirectory,
    services: ServiceOptions,
    config: Mapping[str, Any],
    resume_step: int,
    patience: float,
) -> dict[str, Callable[[Notify], Sink]]:
    folder, run_id = directory.path, tracking_id(directory.path)
    makers: dict[str, Callable[[Notify], Sink]] = {}
    if (project := services.wandb) is not None:
        adapters: Sequence[Path] = (directory.latest, directory.best)
        makers["W&B"] = lambda say: WandbRun(
            project,
            run_id=run_id,
            folder=folder,
            config=config,
            notice=say,
            artifacts=adapters if services.wandb_artifacts else (),
            # A server that never answers leaves time to write an offline run. One that falls silent
            # is waited for at the end, and W&B does so again when the process ends.
            init_seconds=patience * 0.3,
            close_seconds=patience * CLOSING_SHARE * 0.9,
        )
    if services.tensorboard:
        makers["TensorBoard"] = lambda say: TensorBoardRun(
            folder / _TENSORBOARD_FOLDER, resume_step=resume_step
        )
    if (name := services.trackio) is not None:
        makers["trackio"] = lambda say: TrackioRun(
            name, name=f"{folder.name}-{run_id}", config=config
        )
    return makers


def tracking_id(folder: Path) -> str:
    """What services know the run in this folder by: made once, and kept there."""
    file = folder / _ID_FILE
    # A process that was killed before it had written leaves an empty one.
    if not (file.is_file() and file.stat().st_size):
        file.write_text(secrets.token_hex(4), encoding="utf-8")
    return file.read_text(encoding="utf-8")


def _check_installed(services: ServiceOptions) -> None:
    wanted = {
        "wandb": (services.wandb is not None, "wandb"),
        "tensorboardX": (services.tensorboard, "textpolicy[tensorboard]"),
        "trackio": (services.trackio is not None, "textpolicy[trackio]"),
    }
    for module, (asked, package) in wanted.items():
        if asked and find_spec(module) is None:
            raise ConfigError(f"{module} is not installed: pip install '{package}'")

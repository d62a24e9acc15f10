"""Open the tracker of a run: its files, and the services that the user asked for."""

import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from textpolicy.errors import ConfigError
from textpolicy.file_writing import atomic_replace, make_private_folder
from textpolicy.runs import RunDirectory
from textpolicy.tracking.jsonl import RunFiles
from textpolicy.tracking.sink import BackgroundSink, Notify, Sink
from textpolicy.tracking.tensorboard_run import TensorBoardRun
from textpolicy.tracking.tracker import CLOSING_SHARE, PATIENCE, Tracker
from textpolicy.tracking.trackio_run import TrackioRun
from textpolicy.tracking.wandb_run import WandbRun, wandb_mode


@dataclass(frozen=True, kw_only=True)
class ServiceOptions:
    """The services that a run logs to beside its files."""

    wandb: str | None = None
    """A project of Weights & Biases."""
    wandb_artifacts: bool = False
    """Whether the latest and the best adapter are uploaded at the end."""
    tensorboard: bool = False
    """Whether the run's directory gets TensorBoard event files."""
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
    """Return the tracker of a new run, or of a run that resumes at `resume_step`.

    Samples of the first `sample_groups` groups of each step are written, or of all groups. With 0
    there is no samples file. `notice` gets the messages of sinks. Services delay the end of the
    run by at most `patience` seconds. Raise `ConfigError` if the package of a service is missing.
    """
    check_services(services)
    # A samples file of an earlier process must lose its later rows even if none are added.
    wanted = sample_groups != 0 or directory.samples.exists()
    samples = directory.samples if wanted else None
    files = RunFiles(directory.metrics, samples, resume_step=resume_step)
    for damage in files.damage:
        notice(damage)
    openers = _openers(directory, services, config, resume_step, patience)
    return Tracker(
        [files],
        [BackgroundSink(name, open_sink) for name, open_sink in openers.items()],
        notice=notice,
        patience=patience,
        sample_groups=sample_groups,
    )


def check_services(
    services: ServiceOptions, note: Callable[[str], None] = lambda text: None
) -> None:
    """Raise `ConfigError` if the package of a service is missing; note a missing key of W&B."""
    needed = {
        "wandb": (services.wandb is not None, "wandb"),
        "tensorboardX": (services.tensorboard, "'textpolicy[tensorboard]'"),
        "trackio": (services.trackio is not None, "'textpolicy[trackio]'"),
    }
    for module, (asked, package) in needed.items():
        if asked and find_spec(module) is None:
            raise ConfigError(f"{module} is not installed: pip install {package}")
    if services.wandb is not None and wandb_mode() == "offline":
        note(
            "W&B: there is no API key, or WANDB_MODE is offline, so the run is logged to files. "
            "`wandb login` stores a key"
        )


def _openers(
    directory: RunDirectory,
    services: ServiceOptions,
    config: Mapping[str, Any],
    resume_step: int,
    patience: float,
) -> dict[str, Callable[[Notify], Sink]]:
    folder, run_id = directory.path, tracking_id(directory)
    openers: dict[str, Callable[[Notify], Sink]] = {}
    if (project := services.wandb) is not None:
        make_private_folder(directory.wandb)
        openers["W&B"] = lambda notify: WandbRun(
            project,
            run_id=run_id,
            folder=folder,
            config=config,
            notice=notify,
            artifacts=(directory.latest, directory.best) if services.wandb_artifacts else (),
            # Leaves time to write an offline run if the server never answers. W&B waits again for
            # a silent server when the process ends.
            init_seconds=patience * 0.3,
            close_seconds=patience * CLOSING_SHARE * 0.9,
        )
    if services.tensorboard:
        events = make_private_folder(directory.tensorboard)
        openers["TensorBoard"] = lambda notify: TensorBoardRun(events, resume_step=resume_step)
    if (name := services.trackio) is not None:
        run_name = f"{folder.name}-{run_id}"
        openers["trackio"] = lambda notify: TrackioRun(name, name=run_name, config=config)
    return openers


def tracking_id(directory: RunDirectory) -> str:
    """Return the id by which services know the run. The run's folder keeps the id."""
    file = directory.tracking_id
    known = file.read_bytes() if file.is_file() else b""
    # A full disk can leave an empty file.
    if not re.fullmatch(rb"[0-9a-f]{8}", known):
        known = secrets.token_hex(4).encode()
        with atomic_replace(file, private=True) as temporary:
            temporary.write_bytes(known)
    return known.decode()

"""WandbRun: a sink for Weights & Biases, with the metric names of this library."""

import json
import netrc
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlparse

from textpolicy.tracking.sink import BackgroundSink, SampleRow
from textpolicy.types import Metrics

# The browser keeps every row of a table in memory. samples.jsonl has all samples.
_MAX_TABLE_ROWS = 5000
_COLUMNS = (
    *("step", "group", "member", "version", "prompt", "completion"),
    *("reward", "rewards", "metrics", "advantage", "tokens", "stop_reason"),
)


class WandbRun:
    """Logs to `project`: online if there is an API key, and offline into `folder` if not.

    The variable `WANDB_MODE` overrides this rule. If no server answers in `init_seconds`, the run
    is offline and `notice` gets a message; `wandb sync` uploads the run later. A run with a known
    `run_id` is resumed. `close` uploads the `artifacts` that exist, in at most `close_seconds`.
    """

    def __init__(
        self,
        project: str,
        *,
        run_id: str,
        folder: Path,
        config: Mapping[str, Any],
        notice: Callable[[str], None],
        artifacts: Sequence[Path] = (),
        init_seconds: float = 15.0,
        close_seconds: float = 30.0,
    ) -> None:
        # The import takes more than a second, and most runs do not use wandb.
        import wandb
        import wandb.errors

        self._notice = notice
        self._folder = folder / "wandb"
        self._upload_seconds = close_seconds / 3
        options: dict[str, Any] = {
            **{"project": project, "id": run_id, "resume": "allow"},
            **{"name": folder.name, "dir": str(folder), "config": dict(config)},
            "settings": wandb.Settings(
                console="off",
                silent=True,
                init_timeout=init_seconds,
                finish_timeout=close_seconds - self._upload_seconds,
                finish_timeout_raises=True,
            ),
        }
        mode = wandb_mode()
        sync = f"upload it later: wandb sync {self._folder}/offline-run-*"
        if mode == "offline":
            notice(f"the run is offline; {sync}")
        wandb.setup(options["settings"])
        try:
            self._run = wandb.init(mode=cast(Any, mode), **options)
        except wandb.errors.CommError as error:
            reason = str(error).splitlines()[0]
            notice(f"no server answered, so the run is offline ({reason}); {sync}")
            # The wandb service still holds the id of the run that failed to start.
            wandb.teardown()
            wandb.setup(options["settings"])
            self._run = wandb.init(mode="offline", **options)
        uploads = _Uploads(self._run, artifacts)
        self._uploads = BackgroundSink("uploads", lambda notify: uploads)

    def write(self, step: int, metrics: Metrics) -> None:
        """Log `metrics` at `step`."""
        self._run.log(metrics, step=step)

    def write_samples(self, step: int, samples: Sequence[SampleRow]) -> None:
        """Add rows to the table `samples`, up to `_MAX_TABLE_ROWS` rows in all."""
        self._uploads.write_samples(step, samples)

    def close(self) -> None:
        """Upload the artifacts and finish the run, within `close_seconds`."""
        self._uploads.end()
        self._uploads.join(time.monotonic() + self._upload_seconds)
        if fault := self._uploads.fault:
            self._notice(f"some samples or adapters are not uploaded: {fault}")
        try:
            self._run.finish()
        except TimeoutError:
            self._notice(f"a part is not uploaded; upload it: wandb sync {self._folder}/run-*")


class _Uploads:
    """Uploads tables and files in its own thread, because wandb waits for the server for each."""

    def __init__(self, run: Any, artifacts: Sequence[Path]) -> None:
        import wandb

        self._wandb = wandb
        self._run = run
        self._artifacts = artifacts
        self._rows = 0
        # An immutable table keeps only its first rows, and a mutable one is sent whole each time.
        self._table: Any = wandb.Table(columns=list(_COLUMNS), log_mode="INCREMENTAL")

    def write(self, step: int, metrics: Metrics) -> None:
        """Do nothing, because metrics go directly to the run."""

    def write_samples(self, step: int, samples: Sequence[SampleRow]) -> None:
        """Log the rows at the current step of the metrics. Each row names its own step."""
        samples = samples[: _MAX_TABLE_ROWS - self._rows]
        for sample in samples:
            self._table.add_data(*(_cell(sample.get(column)) for column in _COLUMNS))
        self._rows += len(samples)
        if samples:
            self._run.log({"samples": self._table}, commit=False)

    def close(self) -> None:
        """Upload the files that exist."""
        if files := [path for path in self._artifacts if path.is_file()]:
            artifact = self._wandb.Artifact(f"adapters-{self._run.id}", type="model")
            for path in files:
                artifact.add_file(str(path), policy="immutable")
            self._run.log_artifact(artifact)


def _cell(value: object) -> object:
    """Return text and numbers unchanged, and other values as text: a column has one type."""
    if isinstance(value, str | int | float):
        return value
    return "" if value is None else json.dumps(value)


def wandb_mode() -> str:
    """Return WANDB_MODE, or else online if there is a key and offline if there is none."""
    return os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False

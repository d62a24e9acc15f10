"""A run on Weights & Biases: the same metrics under the same names, with explicit steps."""

import json
import netrc
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlparse

from textpolicy.tracking.background_sink import BackgroundSink
from textpolicy.tracking.sink import SampleRow
from textpolicy.types import Metrics

# Every row is kept by the browser: a table is for looking at, samples.jsonl has them all.
_MAX_TABLE_ROWS = 5000
_COLUMNS = (
    *("step", "group", "member", "version", "prompt", "completion"),
    *("reward", "rewards", "advantage", "tokens", "stop_reason"),
)


class WandbRun:
    """Logs to `project`: online where an API key is at hand, into `folder` without network if not.

    `WANDB_MODE` decides if it is set. Where no server answers in `init_seconds` the run is kept
    offline too, and `notice` hears of it; `wandb sync` uploads such runs later. A known `run_id`
    is gone on with. `artifacts` are uploaded by `close`, as far as they are there; it takes at
    most `close_seconds`.
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
        # The import takes more than a second, and most runs do without.
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
        mode = os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")
        sync = f"to upload it: wandb sync {self._folder}/offline-run-*"
        if mode == "offline":
            notice(f"kept offline; {sync}")
        wandb.setup(options["settings"])
        try:
            self._run = wandb.init(mode=cast(Any, mode), **options)
        except wandb.errors.CommError as error:
            notice(f"no server answered, so the run is kept offline ({_first_line(error)}); {sync}")
            # The service holds the id of a run that failed to begin.
            wandb.teardown()
            wandb.setup(options["settings"])
            self._run = wandb.init(mode="offline", **options)
        uploads = _Uploads(self._run, artifacts)
        self._uploads = BackgroundSink("uploads", lambda say: uploads)

    def write(self, step: int, metrics: Metrics) -> None:
        """Log `metrics` at `step`."""
        self._run.log(metrics, step=step)

    def write_samples(self, step: int, samples: Sequence[SampleRow]) -> None:
        """Add rows to the table `samples`, which takes `_MAX_TABLE_ROWS` in all."""
        self._uploads.write_samples(step, samples)

    def close(self) -> None:
        """Upload the artifacts and finish the run, within a bounded time."""
        self._uploads.end()
        self._uploads.join(time.monotonic() + self._upload_seconds)
        if fault := self._uploads.fault:
            self._notice(f"samples and adapters are not all uploaded: {fault}")
        try:
            self._run.finish()
        except TimeoutError:
            self._notice(f"not all was uploaded; to do so: wandb sync {self._folder}/run-*")


class _Uploads:
    """What W&B sends by itself waits for nobody; tables and files ask the server first, without
    limit, so they have a thread of their own."""

    def __init__(self, run: Any, artifacts: Sequence[Path]) -> None:
        import wandb

        self._wandb = wandb
        self._run = run
        self._artifacts = artifacts
        self._rows = 0
        # An immutable table keeps its first rows only, a mutable one is sent whole each time.
        self._table: Any = wandb.Table(columns=list(_COLUMNS), log_mode="INCREMENTAL")

    def write(self, step: int, metrics: Metrics) -> None:
        """Nothing: metrics go straight to the run."""

    def write_samples(self, step: int, samples: Sequence[SampleRow]) -> None:
        """Log the rows beside whatever step the metrics have come to; each names its own."""
        samples = samples[: _MAX_TABLE_ROWS - self._rows]
        for sample in samples:
            self._table.add_data(*(_cell(sample.get(column)) for column in _COLUMNS))
        self._rows += len(samples)
        if samples:
            self._run.log({"samples": self._table}, commit=False)

    def close(self) -> None:
        """Upload the files that are there."""
        if files := [path for path in self._artifacts if path.is_file()]:
            artifact = self._wandb.Artifact(f"adapters-{self._run.id}", type="model")
            for path in files:
                artifact.add_file(str(path), policy="immutable")
            self._run.log_artifact(artifact)


def _cell(value: object) -> object:
    """Columns of one type each: what JSON nests, or has no value, is text."""
    if isinstance(value, str | int | float):
        return value
    return "" if value is None else json.dumps(value)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False
